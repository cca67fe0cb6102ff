"""`python -m spvtpm.swtpm` is the command `spvtpm-swtpm`."""

from spvtpm.swtpm.main import main

if __name__ == "__main__":
    main()
