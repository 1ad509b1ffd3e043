"""`python -m tinyvllm` is the `tinyvllm` command, for where its script is not on the path."""

from tinyvllm.cli import main

if __name__ == "__main__":
    main()
