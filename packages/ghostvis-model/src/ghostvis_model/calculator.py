"""A calculator for models: exact arithmetic on what they write, parsed here, never given to Python's `eval`.

    calculate("(48 / 2 + 0.1) * 3")      # "72.3"

Numbers are fractions, so 0.1 + 0.2 is 0.3 and 48 / 2 is 24. What the model writes is untrusted: its length, its nesting
and the size of every intermediate result are bounded, and with them the time.
"""

from __future__ import annotations

import re
from decimal import Decimal, localcontext
from fractions import Fraction

from ghostvis_model.errors import GhostVisError

MAX_CHARACTERS = 256
MAX_NESTING = 32
MAX_BITS = 2048  # of numerator and denominator: more than 600 digits
_FAR = Fraction(2**64)  # roots are taken in floats, which hold nothing below 1e-324
SHOWN_DIGITS = 12
SHOWN_WHOLE = 40  # digits of a whole number that are written out

_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?(?:[eE][+-]?\d{1,3})?|\.\d+"
_TOKEN = re.compile(rf"\s*(?:({_NUMBER})|(\*\*|//|[-+*/%()×÷−]))")
_SAME = {"×": "*", "÷": "/", "−": "-"}


class CalculatorError(GhostVisError):
    """An expression that is not arithmetic, has no value, or is too large."""


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / // % ** and parentheses; Python's precedence.

    Whole numbers of up to 40 digits are written out, others to 12 significant digits. Thousands commas are read.
    Raises CalculatorError for anything else, division by zero, and what passes the limits above.
    """
    return show(_Parser(expression).value())


def show(value: Fraction) -> str:
    """A number as a person writes it: 24, 72.3, 0.333333333333, 1.5e-9."""
    if value.denominator == 1 and abs(value) < 10**SHOWN_WHOLE:
        return str(value.numerator)
    with localcontext() as context:
        context.prec = SHOWN_DIGITS
        rounded = (Decimal(value.numerator) / Decimal(value.denominator)).normalize()
    _, digits, exponent = rounded.as_tuple()
    assert isinstance(exponent, int)
    if -7 <= exponent + len(digits) <= SHOWN_DIGITS:
        return f"{rounded:f}"
    return f"{rounded:e}".replace("e+", "e")


class _Parser:
    """Recursive descent; every function reads one level of precedence and leaves `place` behind what it read."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_CHARACTERS:
            raise CalculatorError(f"an expression of {len(text)} characters; at most {MAX_CHARACTERS} are calculated")
        self.tokens: list[str] = []
        end = len(text.rstrip())
        at = 0
        while at < end:
            match = _TOKEN.match(text, at)
            if match is None or match.end() == at:
                raise CalculatorError(f"{text[at:end].strip()[:20]!r} is no number and none of + - * / // % ** ( )")
            token = match.group(1) or match.group(2)
            self.tokens.append(_SAME.get(token, token))
            at = match.end()
        self.tokens.append("")  # the end
        self.place = 0

    def value(self) -> Fraction:
        value = self.sum(0)
        if self.tokens[self.place]:
            raise CalculatorError(f"{self.tokens[self.place]!r} where an operator or the end was expected")
        return value

    def take(self, *wanted: str) -> str:
        """The next token if it is one of these, else ""."""
        token = self.tokens[self.place]
        if token and token in wanted:
            self.place += 1
            return token
        return ""

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while operator := self.take("+", "-"):
            other = self.product(depth)
            value = _bounded(value + other if operator == "+" else value - other)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.signed(depth)
        while operator := self.take("*", "/", "//", "%"):
            other = self.signed(depth)
            if operator == "*":
                value = _bounded(value * other)
            elif other == 0:
                raise CalculatorError("division by zero")
            elif operator == "/":
                value = _bounded(value / other)
            else:
                value = _bounded(Fraction(value // other) if operator == "//" else value % other)
        return value

    def signed(self, depth: int) -> Fraction:
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        value = self.power(depth)
        return -value if negative else value

    def power(self, depth: int) -> Fraction:
        value = self.atom(depth)
        if self.take("**"):
            return _power(value, self.signed(self.deeper(depth)))  # from the right: 2 ** 3 ** 2 is 2 ** 9
        return value

    def atom(self, depth: int) -> Fraction:
        if self.take("("):
            value = self.sum(self.deeper(depth))
            if not self.take(")"):
                raise CalculatorError("a parenthesis that is never closed")
            return value
        token = self.tokens[self.place]
        if not token or not (token[0].isdigit() or token[0] == "."):
            raise CalculatorError(f"{token!r} where a number was expected" if token else "it ends before its value")
        self.place += 1
        return _bounded(Fraction(token.replace(",", "")))

    def deeper(self, depth: int) -> int:
        if depth >= MAX_NESTING:
            raise CalculatorError(f"more than {MAX_NESTING} parentheses or powers inside each other")
        return depth + 1


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        if base < 0 or (base == 0 and exponent < 0) or abs(exponent) > _FAR or (base and not 1 / _FAR <= base <= _FAR):
            raise CalculatorError("a root of a negative number, or of one that is too large or too small")
        try:
            return _bounded(Fraction(float(base) ** float(exponent)))
        except OverflowError:
            raise CalculatorError("the result is too large") from None
    if base == 0 and exponent < 0:
        raise CalculatorError("division by zero")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if base not in (0, 1, -1) and bits * abs(exponent) > 2 * MAX_BITS:  # before it is worked out
        raise CalculatorError(f"the result has more than {MAX_BITS} bits")
    exponent = exponent if base not in (0, 1, -1) else exponent % 2 + 2 * (exponent != 0)
    return _bounded(base ** int(exponent))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise CalculatorError(f"a number of more than {MAX_BITS} bits")
    return value
