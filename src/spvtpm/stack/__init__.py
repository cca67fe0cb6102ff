"""The whole on one machine: `spvtpm up`. A door: it sees every domain, and starts each as a process of its own."""
