"""The shell of funcprobe: everything that touches the world. It imports the core, never the reverse."""

import logging

# Where bitsandbytes is installed, peft imports it, and on a CPU with AVX512-BF16 it says that a kernel
# is missing, which is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
)
