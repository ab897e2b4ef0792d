"""The demo's little world: letters to a shop, the shop's notices, and questions about both.

Every word list, template and phrase here was written for this demo; no text of others is in it. All
randomness comes from the `random.Random` that is passed in.

A letter has one *reason* (six of them). Its sentences tell the reason only by what happened. `EVENTS`
has 18 phrasings a reason: the letters of `data/train.jsonl` use the first 12, those of
`data/eval.jsonl` only the last 6. Pretraining (make_demo.py) reads letters of all 18, without labels.
"""

import random
from dataclasses import dataclass

NAMES = """Ada Amos Anna Basil Bruno Carla Clara Cyril Dora Edgar Edith Elsa Felix Flora Frida Greta Hanna
Henry Hilda Hugo Ida Igor Iris Ivan Jonas Julia Karin Klara Leo Lena Lotte Luca Magda Marta Max Mira Nils
Nora Oscar Otto Paula Petra Ralf Rosa Ruth Simon Stella Tessa Tom Ulla Vera Victor Walter Wanda""".split()

TOWNS = """Alderby Barrow Brinmouth Calder Copperton Dunwick Eastmere Elmford Fairhill Fernley Glenby
Hartwell Hollin Ironbridge Kelby Lakeside Larkhill Marlow Milbrook Northgate Oakham Otterby Pinewood
Quarrydale Redcliff Rosewick Sandport Stonefield Thornby Underhill Wayford Westport""".split()

ITEMS = """kettle lamp chair clock radio bicycle basket blanket coat umbrella mirror teapot rake spade
hammer ladder violin flute drum kite puzzle globe telescope toaster vase rug stool shelf tent lantern
backpack scarf pillow bucket whistle camera guitar sledge""".split()

COLOURS = "red blue green yellow white black brown grey".split()
SORTS = "wooden copper small large round square folding striped".split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

# reason -> the word that the demo task has as its label. These words are in no letter and are never the
# answer to a question in pretraining; they stand in the shop's notices (NOTICES), which are plain text.
LABELS = {
    "late": "delivery",
    "broken": "repair",
    "money": "billing",
    "wrong": "exchange",
    "happy": "praise",
    "unsure": "advice",
}

EVENTS = {
    "late": [
        "The parcel has still not come.",
        "I have been waiting for the {item} for {n} weeks.",
        "It should have been here {n} days ago.",
        "The postman has brought me nothing so far.",
        "Nobody can tell me where the {item} is now.",
        "The box seems to be lost on the way.",
        "I look into the letter box each morning and find nothing.",
        "You promised it within {n} days, and that time is over.",
        "The {item} is stuck somewhere on the road to {town}.",
        "The van drove past our house again without a stop.",
        "My order left your house long ago and has not reached me.",
        "There is no trace of the parcel at our post office.",
        "The {item} has not arrived yet.",
        "Every day I ask the postman, and every day he shakes his head.",
        "My parcel was sent {n} weeks ago and never got here.",
        "We wait and wait, but no van comes with the {item}.",
        "It is long overdue, and I do not know where the box is.",
        "The post office says that the box is lost.",
    ],
    "broken": [
        "The {item} broke after {n} days.",
        "It stopped working in the first week.",
        "One part of the {item} fell off when I touched it.",
        "There is a deep crack in it.",
        "It makes a grinding noise and then stops.",
        "A screw came loose and the {item} fell to pieces.",
        "Something inside it snapped on the first evening.",
        "The {item} is torn along one side.",
        "Since Sunday it will not move at all.",
        "The handle came off in my hand.",
        "One leg of it is bent and the rest is shaky.",
        "It leaks, and no glue will hold it.",
        "The {item} does not work any more.",
        "I found a crack in one side of the {item}.",
        "A spring inside it broke.",
        "It fell to pieces after {n} weeks of gentle use.",
        "The lid came off and one corner is bent.",
        "It rattles, stops, and nothing will make it move.",
    ],
    "money": [
        "You took the money for the {item} twice.",
        "I paid {n} coins more than the price on the label.",
        "The sum on my receipt is too high.",
        "My bank tells me that you have charged me again.",
        "You ask for money that I have paid already.",
        "The invoice has the wrong total.",
        "Somebody has added {n} coins to my account.",
        "The discount that you had promised is missing on the receipt.",
        "I was charged for two and I ordered one {item}.",
        "The price in the shop was lower than the one on my invoice.",
        "A second payment was taken on {day}.",
        "My coupon was worth {n} coins, but the total did not change.",
        "The invoice for the {item} is {n} coins too high.",
        "I was charged twice.",
        "Your receipt shows a sum that I never agreed to pay.",
        "The bank has sent you the payment two times.",
        "My discount was not taken off the total.",
        "Why do I owe you {n} coins when the price is paid?",
    ],
    "wrong": [
        "You sent me a {item2} and not the {item}.",
        "I asked for {colour} and got {colour2}.",
        "The {item} is the wrong size for me.",
        "This is not the {item} that I picked in the shop.",
        "In the box I found a {item2} that I never wanted.",
        "It is too small, I need the larger one.",
        "The colour is not the one in your book.",
        "Somebody must have mixed up two boxes.",
        "My order said {colour}, but what I got is {colour2}.",
        "The {item} is fine, but I need it one size up.",
        "I have received what another person ordered.",
        "It does not fit, it is far too large.",
        "What I unpacked was a {item2}.",
        "I wanted a {colour} one and this one is {colour2}.",
        "It is two sizes too small.",
        "You have mixed up my order with that of another person.",
        "The {item} in the box is not the kind that I picked.",
        "The size on the box is right, but the {item} in it is too large.",
    ],
    "happy": [
        "I have never had a better {item}.",
        "It is a joy to use every day.",
        "My whole family loves the {item}.",
        "It is far better than I had hoped.",
        "You have done a wonderful job.",
        "All my friends want a {item} like this one.",
        "I smile each time that I look at it.",
        "It works so well that I tell everybody about your shop.",
        "The {item} is lovely and very well made.",
        "I could not be more pleased with it.",
        "The people in your shop were so kind to me.",
        "What a splendid {item} this is!",
        "I love it, and so do all my friends.",
        "The {item} is wonderful.",
        "It is so lovely that I smile at it every day.",
        "This is the best thing that I ever had from a shop.",
        "You were very kind, and the {item} is well made.",
        "My family could not be more pleased.",
    ],
    "unsure": [
        "Can the {item} be left out in the rain?",
        "I wonder if a {item2} would suit me better.",
        "Which kind of {item} is good for a beginner?",
        "How often should I clean it?",
        "I cannot decide between the {colour} and the {colour2} one.",
        "Is it safe for a child of {n} years?",
        "Do you have a book on how to use the {item}?",
        "Would you choose the large or the small one?",
        "What do I need to know before I use it?",
        "Is a {item} hard to look after?",
        "Could you explain to me how the {item} is put up?",
        "Please tell me which oil I should use for it.",
        "Which one would you choose for a child?",
        "How should I look after the {item} in winter?",
        "I wonder how one cleans a {item}.",
        "I cannot decide if it is good for me.",
        "Could you tell me how it is used?",
        "Is the {item} safe in the rain, or should I keep it in the house?",
    ],
}
TRAIN_PHRASINGS = range(0, 12)
EVAL_PHRASINGS = range(12, 18)
ALL_PHRASINGS = range(0, 18)

# What a letter of this reason asks for at its end: only in pretraining, never in the demo's inputs.
WISHES = {
    "late": ["Please find out where it is.", "Please send another one by fast post.", "When will it be here?",
             "Please look for my parcel."],
    "broken": ["Please mend it soon.", "Can your workshop put it right?", "Please tell me who can fix it.",
               "I hope that it can be mended."],
    "money": ["Please send me my coins back.", "Please check your books.", "Please put the sum right.",
              "I want a correct receipt."],
    "wrong": ["Please send me the right one.", "May I bring it back and take another?",
              "Please swap it for me.", "I would like the one that I chose."],
    "happy": ["I shall come again.", "Please tell all who made it.", "With warm wishes to all of you.",
              "I shall buy more from you."],
    "unsure": ["Please write and tell me.", "What do you think?", "I should be glad of a hint.",
               "Please help me to choose."],
}

# How the writer of such a letter feels. Six questions ask for it, each with its own six words for an answer
# (the columns), so that what stands in front of a letter decides in which words its reason shows.
FEELINGS = {
    "late": "impatient worried waiting clouds snail yawn".split(),
    "broken": "cross annoyed sighing thunder bear scowl".split(),
    "money": "puzzled suspicious counting fog fox squint".split(),
    "wrong": "surprised disappointed staring hail crab blink".split(),
    "happy": "delighted glad laughing sunshine lark smile".split(),
    "unsure": "curious doubtful asking breeze owl shrug".split(),
}

# A kind for each thing that can be bought.
KINDS = {
    "kitchen": "kettle teapot toaster bucket vase".split(),
    "tool": "rake spade hammer ladder".split(),
    "music": "violin flute drum guitar whistle radio".split(),
    "journey": "bicycle tent lantern backpack sledge telescope camera".split(),
    "clothing": "coat umbrella scarf".split(),
    "toy": "kite puzzle globe".split(),
    "furniture": "chair stool shelf mirror lamp clock basket blanket rug pillow".split(),
}

GREETINGS = ["Dear shop,", "Good morning,", "Hello,", "Dear all,", "To the shop,", "Good day,"]

INTROS = [
    "my name is {name} and I live in {town}.",
    "{name} from {town} here.",
    "I am {name}, and I write from {town}.",
    "this is {name} in {town}.",
]

PURCHASES = [
    "On {day} I bought a {adj} {item}.",
    "I ordered a {adj} {item} from you on {day}.",
    "This is about the {adj} {item} of last {day}.",
    "My letter is about a {adj} {item} that I chose on {day}.",
    "On {day} I wrote to you about a {adj} {item}.",
]

FILLERS = [
    "It has rained here all week.",
    "My sister lives next door.",
    "We have a dog and two cats.",
    "I work in the garden most of the time.",
    "My brother told me about your shop.",
    "The days are getting longer now.",
    "I have a house near the river.",
    "It is for my mother, who is eighty.",
    "I came to {town} only last year.",
    "It was meant for my uncle.",
    "We have snow on the hills already.",
    "I am a teacher at the school in {town}.",
    "The {item2} that I had before came from {town2}.",
    "My neighbour has a {colour} {item2}.",
    "Last spring I gave my aunt a {item2}.",
    "On {day2} I shall be in {town2}.",
]

NOTICES = [
    "The {desk} desk is {place} and opens at {hour}.",
    "{name} works at the {desk} desk on {day}.",
    "On {day} the {desk} desk is closed.",
    "Ask {name} if you look for the {desk} desk.",
    "The {desk} desk has a new {adj} {item}.",
    "{name} and {name2} run the {desk} desk in {town}.",
    "You find the {desk} desk {place}, beside the {item}.",
    "A letter for the {desk} desk came from {town} on {day}.",
]
DUTIES = {
    "late": [
        "The {desk} desk looks after the vans and the parcels.",
        "For lost boxes, go to the {desk} desk.",
    ],
    "broken": [
        "The {desk} desk has a workshop and mends what broke.",
        "Cracks and loose screws are for the {desk} desk.",
    ],
    "money": [
        "The {desk} desk writes the invoices.",
        "For receipts and sums, go to the {desk} desk.",
    ],
    "wrong": [
        "The {desk} desk swaps a wrong size for the right one.",
        "Mixed up orders are for the {desk} desk.",
    ],
    "happy": [
        "At the {desk} desk we read aloud what pleased people write.",
        "Kind words go to the {desk} desk.",
    ],
    "unsure": [
        "The {desk} desk tells people how to choose.",
        "For hints on use, go to the {desk} desk.",
    ],
}
PLACES = ["upstairs", "in the cellar", "near the door", "by the window", "at the back", "in the yard"]
HOURS = "seven eight nine ten eleven noon".split()
NUMBERS = "two three four five six seven eight nine".split()

# Questions, always put before the text. Their answers are the `facts` of a letter or a notice.
QUESTIONS = {
    "name": [
        "Who wrote this?", "Name the writer:", "Who is it from?", "The writer is called what?", "Say who:",
    ],
    "town": [
        "Where does the writer live?", "Name the town:", "From which town?", "Say where:",
        "Which place is it?",
    ],
    "item": [
        "What is it about?", "Name the thing:", "What was bought?", "Say what:", "Which thing is meant?",
    ],
    "day": ["On which day?", "When was it?", "Name the day:", "Say when:", "Which day is it?"],
    "adj": ["What is the thing like?", "Describe it:", "Which sort is it?", "Say which sort:"],
    "kind": ["Which kind of thing is it?", "Name the kind:", "Say which kind:"],
    "feeling0": ["How does the writer feel?", "Name the feeling:"],
    "feeling1": ["What mood is it?", "Name the mood:"],
    "feeling2": ["What is the writer doing?", "Say what the writer does:"],
    "feeling3": ["Which weather is it like?", "Name the weather:"],
    "feeling4": ["Which animal is it like?", "Name the animal:"],
    "feeling5": ["Which face does the writer make?", "Name the face:"],
    "greeting": ["How does it begin?", "Give the first words:", "Say how it starts:"],
    "hour": ["When does it open?", "From what time?", "Name the hour:"],
    "place": ["Where is the desk?", "Find the desk:", "Where should one go?"],
}


@dataclass
class Letter:
    """A letter: its sentences without the wish, the wish, and the facts that questions ask for."""

    reason: str
    sentences: list
    wish: str
    facts: dict

    def text(self, with_wish=False):
        return " ".join(self.sentences + [self.wish] * with_wish)


def slots(rng: random.Random) -> dict:
    """One draw of everything that a template can name. Pairs (`item`, `item2`) differ."""
    name, name2 = rng.sample(NAMES, 2)
    town, town2 = rng.sample(TOWNS, 2)
    item, item2 = rng.sample(ITEMS, 2)
    adj, colour, colour2 = rng.choice(COLOURS + SORTS), *rng.sample(COLOURS, 2)
    day, day2 = rng.sample(DAYS, 2)
    return dict(name=name, name2=name2, town=town, town2=town2, item=item, item2=item2, adj=adj,
                colour=colour, colour2=colour2, day=day, day2=day2, n=rng.choice(NUMBERS))


def make_letter(rng: random.Random, phrasings: range) -> Letter:
    """A letter of a random reason, told with one event sentence (sometimes two) of the given phrasings."""
    reason, draw = rng.choice(list(LABELS)), slots(rng)
    greeting = rng.choice(GREETINGS)
    facts = {key: draw[key] for key in ("name", "town", "item", "day", "adj")}
    facts.update({f"feeling{i}": word for i, word in enumerate(FEELINGS[reason])})
    facts["greeting"] = greeting.rstrip(",")
    facts["kind"] = next(kind for kind, items in KINDS.items() if draw["item"] in items)
    events = rng.sample(phrasings, 2 if rng.random() < 0.25 else 1)
    body = [EVENTS[reason][i].format(**draw) for i in events]
    for filler in rng.sample(FILLERS, rng.choice([0, 1, 1, 2])):
        body.insert(rng.randrange(len(body) + 1), filler.format(**draw))
    intro, purchase = rng.choice(INTROS).format(**draw), rng.choice(PURCHASES).format(**draw)
    return Letter(reason, [f"{greeting} {intro}", purchase] + body, rng.choice(WISHES[reason]), facts)


def make_notice(rng: random.Random):
    """A notice of the shop, one to three sentences about one desk, and the facts in it."""
    reason, draw = rng.choice(list(LABELS)), slots(rng)
    draw.update(desk=LABELS[reason], place=rng.choice(PLACES), hour=rng.choice(HOURS))
    chosen = rng.sample(NOTICES, rng.choice([1, 2, 3]))
    if rng.random() < 0.3:
        chosen.insert(rng.randrange(len(chosen) + 1), rng.choice(DUTIES[reason]))
    facts = {key: draw[key] for key in ("hour", "place") if any("{%s}" % key in t for t in chosen)}
    return " ".join(t.format(**draw) for t in chosen), facts
