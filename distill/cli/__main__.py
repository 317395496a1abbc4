"""`python -m distill.cli`."""

from distill.cli import entry

if __name__ == "__main__":
    entry()
