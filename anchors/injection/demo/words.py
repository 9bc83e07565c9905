"""Words for numbers, colours and shapes, in five languages."""

Word = str

ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def in_words(number: int) -> Word:
    """A number from 0 to 99 in English."""
    if number < 20:
        return ONES[number]
    ten, one = divmod(number, 10)
    return TENS[ten - 2] + (f"-{ONES[one]}" if one else "")


NUMBERS = tuple(in_words(i) for i in range(100))

COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 150, 60),
    "blue": (50, 80, 200),
    "yellow": (235, 200, 40),
    "purple": (140, 60, 160),
    "black": (30, 30, 30),
}
"""RGB by name."""

SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars"}
"""Plural by singular."""


def plural(noun: Word, count: int) -> Word:
    """A shape's name after a number."""
    return noun if count == 1 else SHAPES[noun]


_ENGLISH = [*ONES[:10], *COLOURS, *SHAPES]

LANGUAGES = {
    "French": "zéro un deux trois quatre cinq six sept huit neuf rouge vert bleu jaune violet noir cercle carré triangle étoile",
    "German": "null eins zwei drei vier fünf sechs sieben acht neun rot grün blau gelb lila schwarz Kreis Quadrat Dreieck Stern",
    "Spanish": "cero uno dos tres cuatro cinco seis siete ocho nueve rojo verde azul amarillo morado negro círculo cuadrado triángulo estrella",
    "Italian": "zero uno due tre quattro cinque sei sette otto nove rosso verde blu giallo viola nero cerchio quadrato triangolo stella",
}

FOREIGN: dict[str, dict[Word, Word]] = {
    name: dict(zip(_ENGLISH, text.split(), strict=True)) for name, text in LANGUAGES.items()
}
"""By language: the word for an English one."""
