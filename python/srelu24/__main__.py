"""``python -m srelu24`` is the command line."""

from srelu24.cli.main import app

if __name__ == "__main__":
    app(prog_name="srelu24")
