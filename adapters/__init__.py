"""The shell of funcprobe: everything with side effects. It imports the core, never the reverse."""

import logging

# peft imports bitsandbytes if it is installed, which warns of a missing CPU kernel that is not used.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
