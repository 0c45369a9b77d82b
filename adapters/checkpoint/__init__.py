"""A folder or hub id -> a policy: base, adapter, 4-bit base, tokenizer, the built-in toy."""
