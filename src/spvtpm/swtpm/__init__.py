"""`spvtpm-swtpm`: a TPM by swtpm's command line, for programs that start swtpm themselves. A door: it sees all domains."""
