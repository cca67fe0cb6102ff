"""How a VM reaches its vTPM."""
