"""GPT-2's table: a printable character for each byte, so that pieces of bytes can be written as text.

Source: `bytes_to_unicode` in encoder.py of github.com/openai/gpt-2. Printable bytes of Latin-1 stand for themselves;
the others, in order, for the characters from U+0100 on.
"""

_PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTABLE)
CHARACTERS = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
BYTES = {character: byte for byte, character in CHARACTERS.items()}


def characters_of(data: bytes) -> str:
    """Writes bytes as the characters of the table."""
    return data.decode("latin-1").translate(CHARACTERS)  # Latin-1 has a character for each byte


def bytes_of(piece: str) -> bytes:
    """The bytes that a piece stands for; a piece with a character outside the table stands for its own UTF-8."""
    try:
        return bytes([BYTES[character] for character in piece])
    except KeyError:
        return piece.encode()
