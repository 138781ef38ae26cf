"""The questions that the demo model can answer, their right answers, and those that training never sees.

Owns the kinds of questions, their phrasings, the table of facts, the word list and the held-out split. It
is plain Python: it knows no tensors and no tokenizer. The split depends on a hash of the question's content
alone, so training and tests agree on it on every machine.
"""

import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

FALLBACK_ANSWER = "I can only add, spell, sort and tell a few facts."
HELD_OUT_ONE_IN = 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"

WORDS = tuple(
    """
        able acid acorn actor admit adult afraid after again age agree air alarm album alert alive alone
    amber amount     anchor angle animal ankle answer apple april apron arch area arm army arrow art
    artist asleep atlas attic aunt     autumn awake axe baby back bacon badge bag baker ball bamboo banana
    band bank barn basket bat bath beach bean     bear beard beaver bed bee beetle bell belt bench berry
    bike bird biscuit blanket block board boat body bone book     boot border bottle bowl box boy branch
    brave bread brick bridge bright broom brother brown brush bucket bus bush     butter button cabin
    cable cactus cake camel camera camp canal candle candy canoe cap captain car card carpet     carrot
    castle cat cave cell chain chair chalk cheese cherry chess chicken child church circle city clay clean
    cliff clock cloth cloud coach coal coast coat coffee coin cold collar comb copper coral corn corner
    cotton couch     cow crab cream crow crown cup curtain dance danger dark day deep deer desert desk
    dinner dish doctor dog doll     donkey door dragon dream dress drink drum duck dust eagle ear early
    earth east easy echo edge egg elbow engine     evening eye face fair family farm fast father feather
    fence field fig finger fire fish flag floor flower fly fog     food foot forest fork fox free fresh
    friend frog frost fruit garden garlic gate ghost giant gift girl glass glove     goat gold goose grape
    grass green guitar hair hammer hand happy harbor hat hawk head heart heavy hen hill hockey     honey
    horse hotel house hungry ice idea inch ink iron island ivory jacket jam jar jelly jewel job juice jump
    jungle kettle key king kite kitten knee knife ladder lake lamb lamp large laugh lawn leaf leather
    lemon letter     library light lime lion lip list lizard lock log lunch machine magic mail map maple
    marble market mask meadow     meal melon metal milk mill mirror monkey month moon morning mother mouse
    mouth mud music nail name narrow neck     needle nest net night noise north nose number nurse oak
    ocean office oil old olive onion orange orchard oven owl     page paint palace palm panda paper park
    parrot path peach pear pearl pen pencil pepper phone piano picture pie     pig pillow pilot pine pink
    pipe planet plant plate plum pocket poem police pond pony pool potato pot pretty     pump pupil purple
    purse puzzle queen quick quiet rabbit radio rain raven red rice ring river road robin rock     roof
    room rope rose round ruler sad saddle sail salad salt sand school sea seed shadow shark sharp sheep
    shell     ship shirt shoe shop silver sister sky sleep slow small smile smoke snail snake snow soap
    sock soft song soup     south spider spoon spring square squid star station stone storm story street
    strong student sugar summer sun     swan sweet table tail tall tea teacher tent thumb tiger time toast
    toe tomato tooth towel tower town toy train     tree truck tulip turtle uncle valley vase velvet
    village violin voice wagon wall walnut warm watch water wave     west whale wheat wheel white wide
    wild wind window wing winter wolf wood wool word world yard year yellow young     zebra zero zoo
    """.split()
)

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Austria": "Vienna", "Greece": "Athens", "Poland": "Warsaw", "Norway": "Oslo", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin", "Hungary": "Budapest",
    "Japan": "Tokyo", "China": "Beijing", "Egypt": "Cairo", "Kenya": "Nairobi", "Canada": "Ottawa",
    "Peru": "Lima", "Cuba": "Havana", "Chile": "Santiago", "Iceland": "Reykjavik", "Turkey": "Ankara",
}  # fmt: skip
COLOURS = {
    "grass": "green", "snow": "white", "the sky": "blue", "coal": "black", "a banana": "yellow",
    "blood": "red", "a carrot": "orange", "chocolate": "brown", "an elephant": "grey",
    "a flamingo": "pink",
}  # fmt: skip
LEGS = {
    "dog": "4", "spider": "8", "bird": "2", "beetle": "6", "snake": "0", "horse": "4", "fish": "0",
    "crab": "10", "duck": "2", "bee": "6",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "fast": "slow", "open": "closed",
    "wet": "dry", "full": "empty", "light": "dark", "left": "right", "early": "late", "hard": "soft",
    "rich": "poor", "happy": "sad", "new": "old", "strong": "weak",
}  # fmt: skip

# The last phrasing of each is the terse one, meant for prompts without a chat template.
PHRASINGS = {
    "addition": ("What is {} + {}?", "Add {} and {}.", "How much is {} plus {}?", "{} + {} ="),
    "spelling": ("Spell '{}' backwards.", "Write the word {} backwards.", "{} backwards ="),
    "sorting": (
        "Sort these words: {}, {}, {}",
        "Put these words in alphabetical order: {}, {}, {}",
        "{}, {}, {} sorted =",
    ),
    "capital": ("What is the capital of {}?", "Name the capital of {}.", "capital of {} ="),
    "colour": ("What colour is {}?", "Name the colour of {}.", "colour of {} ="),
    "legs": ("How many legs does a {} have?", "Count the legs of a {}.", "legs of a {} ="),
    "opposite": ("What is the opposite of {}?", "Name the opposite of '{}'.", "opposite of {} ="),
}
FACT_TABLES = {"capital": CAPITALS, "colour": COLOURS, "legs": LEGS, "opposite": OPPOSITES}
FACTS = tuple((topic, subject, answer) for topic, table in FACT_TABLES.items() for subject, answer in table.items())
KIND_WEIGHTS = {"addition": 42, "spelling": 13, "sorting": 36, "facts": 6, "other": 3}
OTHER_OPENINGS = (
    "Tell me about", "Write a poem about", "Write a long story about the", "Hello", "Hi there", "Why", "Translate:",
    "Please explain", "", "", "Who is", "Once upon a time", "How are you", "What is", "Tell me a joke", "Say something",
)  # fmt: skip
OTHER_ENDINGS = ("?", ".", "", "!")

# Sums take longest to learn, and are learnt much faster while little else is.
FIRST_KIND_WEIGHTS = {"addition": 90, "spelling": 3, "sorting": 4, "facts": 2, "other": 1}

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "Be brief.",
    "Answer with one word.",
    "You are a careful calculator.",
    "You are a concise assistant. Give only the answer.",
    "Reply in English.",
    "You are a small demo model.",
)


@dataclass(frozen=True)
class Exercise:
    """One question of one kind with its only right answer; `terse` questions suit plain prompts."""

    kind: str
    question: str
    answer: str
    terse: bool = False


def is_held_out(content: str) -> bool:
    """True for one in HELD_OUT_ONE_IN contents (a word, or a sum written `smaller+larger`)."""
    return zlib.crc32(content.encode()) % HELD_OUT_ONE_IN == 0


def sum_is_held_out(left: int, right: int) -> bool:
    """True for sums of two two-digit numbers that training never sees, in either order."""
    if min(left, right) < 10:
        return False
    return is_held_out(f"{min(left, right)}+{max(left, right)}")


TRAINING_WORDS = tuple(word for word in WORDS if not is_held_out(word))
HELD_OUT_SUMS = tuple((a, b) for a in range(10, 100) for b in range(10, 100) if sum_is_held_out(a, b))
HELD_OUT_WORDS = tuple(word for word in WORDS if is_held_out(word))


def phrase(kind: str, topic: str, parts: tuple[object, ...], answer: str, choose: random.Random) -> Exercise:
    """Word a question in one of its topic's phrasings, each equally likely."""
    phrasings = PHRASINGS[topic]
    number = choose.randrange(len(phrasings))
    return Exercise(kind, phrasings[number].format(*parts), answer, terse=number == len(phrasings) - 1)


def addition(left: int, right: int, choose: random.Random) -> Exercise:
    """A sum of two numbers below 100."""
    return phrase("addition", "addition", (left, right), str(left + right), choose)


def spelling(word: str, choose: random.Random) -> Exercise:
    """A word to be spelt backwards."""
    return phrase("spelling", "spelling", (word,), word[::-1], choose)


def sorting(words: list[str], choose: random.Random) -> Exercise:
    """Three words to be put in alphabetical order."""
    return phrase("sorting", "sorting", tuple(words), ", ".join(sorted(words)), choose)


def fact(number: int, choose: random.Random) -> Exercise:
    """The fact with this number in FACTS."""
    topic, subject, answer = FACTS[number]
    return phrase("facts", topic, (subject,), answer, choose)


def random_letters(choose: random.Random) -> str:
    """3 to 8 random letters that are no held-out word."""
    while True:
        letters = "".join(choose.choices(LETTERS, k=choose.randint(3, 8)))
        if letters not in HELD_OUT_WORDS:
            return letters


def _training_addition(choose: random.Random) -> Exercise:
    """A sum, often of a sort that is hard to learn.

    A third are of single digits, of which the others are made; in a fifth the last digits make 9 or 10, just
    below and just above a carry.
    """
    if choose.random() < 0.33:
        return addition(choose.randrange(10), choose.randrange(10), choose)
    near_carry = choose.random() < 0.3
    while True:
        left, right = choose.randrange(100), choose.randrange(100)
        if near_carry:
            right = right // 10 * 10 + (choose.choice((9, 10)) - left) % 10
        if not sum_is_held_out(left, right):
            return addition(left, right, choose)


def _training_word(choose: random.Random) -> str:
    return choose.choice(TRAINING_WORDS) if choose.random() < 0.4 else random_letters(choose)


def _training_sorting(choose: random.Random) -> Exercise:
    """Words that often begin alike, so that the later letters have to be compared as well."""
    words: list[str] = []
    while len(words) < 3:
        word = _training_word(choose)
        if words and choose.random() < 0.3:
            shared = choose.randint(1, 2)
            word = choose.choice(words)[:shared] + word[shared:]
        if word not in words and word not in HELD_OUT_WORDS:
            words.append(word)
    choose.shuffle(words)
    return sorting(words, choose)


def _other(choose: random.Random) -> Exercise:
    """Something the model was not made for, a few words or a few hundred characters: it says so and ends."""
    count = choose.randint(0, 12) if choose.random() < 0.75 else choose.randint(13, 45)
    words = [_training_word(choose) for _ in range(count)]
    text = " ".join([choose.choice(OTHER_OPENINGS), *words]).strip() + choose.choice(OTHER_ENDINGS)
    return Exercise("other", text[:1].upper() + text[1:], FALLBACK_ANSWER)


def training_example(choose: random.Random, kind_weights: Mapping[str, int] = KIND_WEIGHTS) -> Exercise:
    """One random example, of no question that is held out."""
    makers: dict[str, Callable[[random.Random], Exercise]] = {
        "addition": _training_addition,
        "spelling": lambda source: spelling(_training_word(source), source),
        "sorting": _training_sorting,
        "facts": lambda source: fact(source.randrange(len(FACTS)), source),
        "other": _other,
    }
    kind = choose.choices(list(kind_weights), weights=list(kind_weights.values()))[0]
    return makers[kind](choose)


def held_out_examples(kind: str, count: int, seed: int = 0) -> list[Exercise]:
    """`count` examples whose content training never saw; facts, which are learnt by heart, are any of them.

    Raises ValueError for an unknown kind, or when more different sums are wanted than are held out.
    """
    choose = random.Random(f"{kind}:{seed}")
    if kind == "addition":
        return [addition(left, right, choose) for left, right in choose.sample(HELD_OUT_SUMS, count)]
    if kind == "spelling":
        return [spelling(choose.choice(HELD_OUT_WORDS), choose) for _ in range(count)]
    if kind == "sorting":
        return [sorting(choose.sample(HELD_OUT_WORDS, 3), choose) for _ in range(count)]
    if kind == "facts":
        return [fact(number % len(FACTS), choose) for number in range(count)]
    if kind == "other":
        return [_other(choose) for _ in range(count)]
    raise ValueError(f"unknown kind of question: {kind!r}")


def held_out_additions(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` different held-out sums as (question, answer), worded as chat questions, not tersely."""
    questions = PHRASINGS["addition"][:-1]
    return [
        (questions[number % len(questions)].format(left, right), str(left + right))
        for number, (left, right) in enumerate(random.Random(seed).sample(HELD_OUT_SUMS, count))
    ]
