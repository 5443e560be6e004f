"""The command line as a person or a program meets it: what it prints, and its exit status."""
