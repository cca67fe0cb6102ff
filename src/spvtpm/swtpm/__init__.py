"""`spvtpm-swtpm`, `spvtpm-swtpm-setup`: a TPM by swtpm's command lines, for programs that start swtpm themselves.

A door: it sees all domains.
"""
