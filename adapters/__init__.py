"""The shell of funcprobe: everything that touches the world. It imports the core, never the reverse."""

import logging

# If bitsandbytes is installed, peft imports it, which warns on a CPU with AVX512-BF16 of a kernel
# that is missing, and not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
)
