"""The shell of funcprobe: everything that touches the world. It imports the core, never the reverse."""
