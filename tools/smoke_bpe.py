"""Does an installed ghostvis-bpe work? Trains on a sentence, encodes it and decodes it again.

uv run python tools/smoke_bpe.py
"""

import sys

import ghostvis_bpe

TEXT = "the ghost saw the other ghost, and the other ghost saw the ghost: déjà vu 👻 "


def main() -> int:
    encoding = ghostvis_bpe.train([TEXT] * 8, vocab_size=280, min_frequency=2, special_tokens=("<|bos|>",))
    ids = encoding.encode_ordinary(TEXT)
    if encoding.decode(ids) != TEXT:
        print(f"decode(encode(text)) is another text: {encoding.decode(ids)!r}", file=sys.stderr)
        return 1
    if len(ids) >= len(TEXT.encode()):
        print(f"training merged nothing: {len(ids)} tokens", file=sys.stderr)
        return 1
    print(f"{len(TEXT.encode())} bytes are {len(ids)} tokens of a vocabulary of {encoding.vocab_size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
