"""A document of our own writing for the demo: the chronicle of a town that does not exist.

The text depends on nothing but SEED, so every run of the demo reads the same pages, about 7000 tokens of them. A few
facts are told in one place only, 500 to 6000 tokens before the questions that ask for them.
"""

import random

SEED = 1

FACTS = {
    1821: "The ferryman Tobias Wren planted a walnut tree beside the landing. "
    "Nobody else in the town has ever planted a walnut tree.",
    1847: "The bell of the clock tower was cast that year. The bell of the clock tower is called Old Margaret.",
    1865: "The harbour bakery won a prize for its honey bread. "
    "The secret of the honey bread was a spoon of black pepper.",
    1868: "The captain of the packet boat kept a parrot. The name of the parrot was Admiral Biscuit.",
}

QUESTIONS = [
    "What is the bell of the clock tower called?",
    "What was the secret of the honey bread?",
    "What was the name of the parrot?",
    "What tree did Tobias Wren plant beside the landing?",
    "Write a short summary of the chronicle.",
]

NAMES = [
    "Agnes Holloway",
    "Peter Lamb",
    "Ruth Ashby",
    "Silas Crane",
    "Martha Fenn",
    "Jonas Pike",
    "Edith Marlow",
    "Henry Stroud",
    "Clara Bexley",
    "Walter Quill",
    "Nora Thistle",
    "Amos Darrow",
]
TRADES = ["cooper", "rope maker", "schoolteacher", "miller", "net mender", "apothecary", "carpenter", "printer"]
PLACES = [
    "the lower quay",
    "the market square",
    "the mill race",
    "the chapel lane",
    "the north gate",
    "the drying fields",
    "the rope walk",
    "the old customs house",
]
WINTERS = [
    "The winter was mild, and the river did not freeze.",
    "Ice closed the river for five weeks, and the post came by sledge.",
    "Snow lay on the roofs until the end of March.",
    "A wet winter spoiled the hay in the drying fields.",
]
HARVESTS = [
    "The harvest of rye was good and bread was cheap.",
    "The potatoes failed in the low fields, but barley made up for it.",
    "Apples were so many that they were fed to the pigs.",
    "A dry summer left the mill without water from July to September.",
]
EVENTS = [
    "{a}, the {trade}, opened a workshop at {place} and took two apprentices from the upper valley.",
    "The council met {n} times, mostly about the drains near {place}, and decided nothing.",
    "A fire at {place} burned for one night; {a} led the bucket line and was thanked with a silver spoon.",
    "{a} and {b} were married at the chapel, and the dancing at {place} went on until morning.",
    "The bridge toll was set at {n} pence for a cart, against the advice of {a}.",
    "{n} barrels of salted herring were sold to the inland merchants at {place}.",
    "{a} taught the children to read from a sea atlas, there being no other large book in the town.",
    "The {trade} {a} quarrelled with {b} over a fence at {place}; the judge gave each of them half of it.",
    "A travelling painter stayed at {place} for a month and paid for his room with a portrait of {a}.",
    "The spring flood reached the steps of {place} and took away {n} boats, most of which were found again.",
]


def chronicle(n_year=63):
    """The document: one paragraph a year from 1811."""
    rng = random.Random(SEED)
    pages = ["The Chronicle of Arden Ferry, as kept by the clerks of the town."]
    for year in range(1811, 1811 + n_year):
        lines = [f"The year {year}.", rng.choice(WINTERS)]
        for event in rng.sample(EVENTS, 3):
            a, b = rng.sample(NAMES, 2)
            lines.append(
                event.format(a=a, b=b, trade=rng.choice(TRADES), place=rng.choice(PLACES), n=rng.randrange(3, 60))
            )
        if year in FACTS:
            lines.append(FACTS[year])
        lines.append(rng.choice(HARVESTS))
        pages.append(" ".join(lines))
    return "\n\n".join(pages)
