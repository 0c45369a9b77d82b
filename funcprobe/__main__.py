"""python -m funcprobe, as a launcher of several processes starts it; the shell's, beside the core."""

from funcprobe.adapters.cli import main

if __name__ == "__main__":
    main()
