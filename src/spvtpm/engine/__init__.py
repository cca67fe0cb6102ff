"""One TPM 2.0 in this process: libtpms behind a Python class. Imports nothing of ours; holds one TPM and no key but its own."""
