"""Bytes as a vocabulary that other runtimes accept: byte-level BPE without merges; a token's id is its byte."""

# What 0 stands for between documents, as `coterie train` joins them; no text holds that byte.
END_OF_TEXT = "<|endoftext|>"


def byte_tokens() -> list[str]:
    """The 256 tokens in the order of their bytes.

    Byte-level BPE (GPT-2's) writes a byte that prints as itself, and the others as the characters from U+0100 on.
    """
    printed = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    tokens = [chr(byte if byte in printed else next(others)) for byte in range(256)]
    tokens[0] = END_OF_TEXT
    return tokens
