"""The shell of funcprobe: everything that touches the world. It imports the core, never the reverse."""

import logging

# Where it is installed, peft imports it, and it warns that a CPU kernel is missing that is not used.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
