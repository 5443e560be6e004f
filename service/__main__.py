"""`python -m service`: the same as the `tunledger` command."""

from service.cli.main import main

if __name__ == "__main__":
    main()
