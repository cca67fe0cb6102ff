"""Inside the VM: the CRB driver, and doors for unmodified TPM clients. May import `wire`, nothing else of ours."""
