"""Word lists of the story generator: who the stories are about, where they happen, how they open and close.

Texts use the small template language that `llamajax.box.stories` explains: ``[a|b]`` picks one alternative, ``{slot}``
fills in a word of the story and ``{~pool}`` a fresh sentence of `POOLS`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pronouns:
    """The forms of one third-person pronoun."""

    he: str
    him: str
    his: str
    self: str


HE = Pronouns("he", "him", "his", "himself")
SHE = Pronouns("she", "her", "her", "herself")
IT = Pronouns("it", "it", "its", "itself")


@dataclass(frozen=True)
class Kind:
    """A sort of animal, with the things that belong to it."""

    name: str
    home: str
    food: str
    quirk: str


@dataclass(frozen=True)
class Place:
    """A place and the landmarks that a story may name there."""

    name: str
    homes: tuple[str, ...]
    water: str
    hill: str
    path: str
    spot: str
    tree: str
    folk: str
    sight: str
    night: str


ANIMAL_HE = tuple("Pip Bramble Rufus Otto Basil Hob Tumble Barley Moss Fenn Digby Jasper Nutkin Alder Monty".split())
ANIMAL_SHE = tuple("Hazel Clover Tansy Willa Poppy Juniper Dot Fern Maple Sorrel Nettie Pippa Wren Olive Bess".split())
CHILD_HE = tuple("Tom Ben Leo Sam Felix Theo Milo Jonas Ravi Oscar Kofi Hugo Emil Noah Anton Peter José".split())
CHILD_SHE = tuple("Mia Anna Lucy Nora Ella Ruby Ada Lena Maya Ines Clara Tilda Rosie Amina Greta Zoë Heidi".split())

KINDS = (
    Kind(
        "hedgehog",
        "under the roots of an old hawthorn",
        "baked apples",
        "{His} prickles stood up when {he} was thinking.",
    ),
    Kind(
        "mouse", "in a teapot with a broken spout", "crumbs of yellow cheese", "{His} whiskers shook when {he} laughed."
    ),
    Kind(
        "rabbit", "in a burrow with a round red door", "carrot soup", "One of {his} ears never would stand up straight."
    ),
    Kind(
        "squirrel", "high in a hollow beech", "hazelnut cake", "{His} tail was so bushy that {he} used it as a blanket."
    ),
    Kind(
        "otter",
        "in a snug den by the water",
        "watercress pie",
        "{He} could float on {his} back and hum at the same time.",
    ),
    Kind(
        "mole", "in a tidy tunnel full of books", "turnip stew", "{He} wore tiny round glasses and lost them every day."
    ),
    Kind(
        "badger",
        "in a deep, warm sett with nine rooms",
        "mushroom pie",
        "{He} swept the front step every morning, even in the rain.",
    ),
    Kind("fox", "in a den lined with dry bracken", "blackberry tart", "The tip of {his} tail was as white as milk."),
    Kind(
        "beaver",
        "in a round house of sticks and mud",
        "willow buns",
        "{He} slapped {his} tail on the ground when {he} was excited.",
    ),
    Kind("bear", "in a cave that smelled of honey", "honey cakes", "{He} had the loudest yawn for miles around."),
    Kind(
        "dormouse",
        "in a nest of woven honeysuckle",
        "warm acorn porridge",
        "{He} could fall asleep anywhere, even in a cup.",
    ),
    Kind("weasel", "in a gap in a mossy stone wall", "pea soup", "{He} was so quick that {his} shadow had to hurry."),
)

WOODS = (
    Place(
        name="the Whispering Wood",
        homes=(),
        water="the stream",
        hill="Lookout Hill",
        path="the mossy path",
        spot="the old stump",
        tree="the great oak",
        folk="the animals",
        sight="ferns grew taller than a rabbit's ears",
        night="the owls called softly from tree to tree",
    ),
    Place(
        name="Willow Pond",
        homes=(),
        water="the pond",
        hill="the grassy bank",
        path="the muddy path",
        spot="the flat rock",
        tree="the leaning willow",
        folk="the pond folk",
        sight="the reeds whispered all day long",
        night="the moon lay on the water like a coin",
    ),
    Place(
        name="Honey Meadow",
        homes=(),
        water="the brook",
        hill="the clover hill",
        path="the narrow track",
        spot="the broken gate",
        tree="the wild pear tree",
        folk="the meadow folk",
        sight="the grass grew so tall that only ears stuck out of it",
        night="the wind combed the long grass",
    ),
    Place(
        name="Pine Valley",
        homes=(),
        water="the cold little river",
        hill="Grey Rock",
        path="the stony path",
        spot="the fallen log",
        tree="the tallest pine",
        folk="the neighbours",
        sight="the air always smelled of pine needles",
        night="the wind hummed in the pines like a sleepy choir",
    ),
    Place(
        name="the orchard behind Mill Farm",
        homes=(),
        water="the mill stream",
        hill="Beehive Hill",
        path="the cart track",
        spot="the rain barrel",
        tree="the oldest apple tree",
        folk="the orchard folk",
        sight="the old trees leaned together like aunts at tea",
        night="the stars hung among the branches like silver apples",
    ),
)

TOWNS = (
    Place(
        name="the village of Applewick",
        homes=("in a crooked house with a green door", "above the bakery"),
        water="the river",
        hill="Windmill Hill",
        path="the lane",
        spot="the village well",
        tree="the chestnut tree",
        folk="the villagers",
        sight="geese walked down the middle of the street as if they owned it",
        night="the windmill stood dark and still on the hill",
    ),
    Place(
        name="the harbour town of Saltby",
        homes=("in a blue house above the harbour", "in a cottage with shells round the door"),
        water="the bay",
        hill="the lighthouse hill",
        path="the cliff path",
        spot="the fish steps",
        tree="the bent old pine",
        folk="the fishermen",
        sight="gulls shouted good morning from every chimney",
        night="the lighthouse swung its beam over the quiet sea",
    ),
    Place(
        name="Larkfield Farm",
        homes=("in the little room over the stable", "in a white farmhouse with a red roof"),
        water="the duck pond",
        hill="the sheep hill",
        path="the farm track",
        spot="the hay barn",
        tree="the walnut tree",
        folk="the farm folk",
        sight="the rooster always crowed ten minutes late",
        night="the cows breathed slow and warm in the barn",
    ),
    Place(
        name="the mountain town of High Bell",
        homes=("in a tall thin house by the bridge", "over the clockmaker's shop"),
        water="the river",
        hill="the chapel hill",
        path="the steep street",
        spot="the stone fountain",
        tree="the lime tree",
        folk="the neighbours",
        sight="the town clock was painted with a sun and a moon",
        night="the clock struck nine and the windows went dark one by one",
    ),
    Place(
        name="Island Street",
        homes=("in the narrowest house of the street", "on the top floor, close to the pigeons"),
        water="the canal",
        hill="the park hill",
        path="the towpath",
        spot="the corner shop",
        tree="the plane tree",
        folk="the neighbours",
        sight="washing waved from the balconies like flags",
        night="the street lamps made gold puddles on the stones",
    ),
)

WOOD_ELDERS = ("the old owl", "Grandfather Toad", "Mother Goose", "old Tortoise", "Aunt Heron", "Grandmother Hare")
TOWN_ELDERS = ("Grandmother", "Grandpa Joe", "Mrs. Plum", "Mr. Finch", "Aunt Rosa", "Uncle Henrik", "old Captain Brand")

CHILD_FOODS = ("warm bread and honey", "apple cake", "tomato soup", "pancakes", "cheese and pears", "plum dumplings")
CHILD_QUIRKS = (
    "{He} had freckles on {his} nose and a scab on each knee.",
    "{He} wore a red cap in every kind of weather.",
    "{He} had a loose tooth and liked to wiggle it.",
    "In {his} pocket {he} always carried a smooth green stone.",
    "{His} hair stood up at the back like a question mark.",
    "{He} could walk on {his} hands, but only for three steps.",
)

ODD_TRAITS = ("little", "cheerful", "shy", "dreamy", "brave", "gentle", "proud", "hopeful", "restless", "friendly")

SEASONS = (
    ("spring", ("soft", "bright", "windy", "fresh", "rainy")),
    ("summer", ("warm", "golden", "hazy", "still", "blue")),
    ("autumn", ("misty", "crisp", "windy", "grey", "cool")),
    ("winter", ("frosty", "white", "cold", "clear", "pale")),
)

# A trait and sentences that show it.
TRAITS = (
    (
        "curious",
        "[{He} asked more questions before breakfast than most folk ask in a week.|{He} could not pass a "
        'closed box without wondering what was inside.|"Why?" was {his} favourite word.]',
    ),
    (
        "shy",
        "[{He} spoke so softly that everyone had to lean in to hear.|When visitors came, {he} liked to watch "
        "them from behind the curtain first.|{He} had many thoughts, but {he} kept most of them in {his} "
        "pocket.]",
    ),
    (
        "cheerful",
        "[{He} hummed while {he} worked and whistled while {he} rested.|Even on Mondays {he} woke up "
        "smiling.|{He} said good morning to everyone, even to the stones.]",
    ),
    (
        "stubborn",
        '[Once {he} had made up {his} mind, not even the wind could change it.|"I can do it by myself," {he} '
        "liked to say.|{He} never took the short way if {he} had chosen the long one.]",
    ),
    (
        "careful",
        "[{He} looked twice before every step and three times before every jump.|{He} counted everything, "
        "just to be sure.|{He} always carried a bit of string, in case of need.]",
    ),
    (
        "dreamy",
        "[{He} often put salt in the tea because {he} was thinking of clouds.|{He} could look at the sky for "
        "a whole afternoon.|{He} had once walked into the same tree twice in one day.]",
    ),
    (
        "impatient",
        "[{He} ate {his} soup too hot because waiting was so hard.|{He} thought that five minutes was a very "
        'long time.|"Is it time yet?" {he} asked all day long.]',
    ),
    (
        "gentle",
        "[{He} stepped around beetles and said sorry to flowers.|Even the grumpiest neighbour spoke kindly to"
        " {him}.|{He} never slammed a door in {his} life.]",
    ),
    (
        "merry",
        "[{He} knew one hundred jokes, and eleven of them were good.|Wherever {he} went, somebody began to "
        "laugh.|{He} danced when {he} swept the floor.]",
    ),
    (
        "clever",
        "[{He} could mend almost anything with a nail and a bit of wax.|{He} liked riddles better than "
        "pudding.|{He} kept a list of good ideas under {his} pillow.]",
    ),
    (
        "small",
        "[{He} had to stand on a box to see out of the window.|{He} was so little that {he} slept in a "
        "drawer.|Others often forgot that {he} was in the room.]",
    ),
    (
        "hopeful",
        "[Every morning {he} was sure that something good would happen before lunch.|When it rained, {he} "
        "looked for the rainbow.|{He} kept an empty jar on the shelf, in case {he} found something worth "
        "keeping.]",
    ),
    (
        "untidy",
        "[{His} pockets were full of string, feathers and old toast.|There were leaves in {his} bed and "
        "spoons in {his} boots.|{He} could never find two socks of the same colour.]",
    ),
    (
        "quiet",
        "[{He} listened more than {he} talked, and so {he} heard a great deal.|{He} liked the hour before "
        "anyone else was awake.|{He} could sit so still that birds forgot about {him}.]",
    ),
)

POOLS = {
    "open": ("[{~once}|{~once}|{~plain}|{~plain}|{~plain}|{~day}|{~day}]"),
    "once": (
        "[Once upon a time there was a {trait} {kind} named {h}, who lived {home}.|Once upon a time, in "
        "{place}, there lived a {trait} {kind} named {h}.|Once upon a time a {trait} {kind} lived {home}. "
        "{His} name was {h}.|Once upon a time, {home}, there lived a {kind} called {h}.|Once upon a time, "
        "where {sight}, there was a little {kind} named {h}.]"
    ),
    "plain": (
        "[{h} was a {trait} {kind} who lived {home}.|In {place}, where {sight}, lived a {trait} {kind} named "
        "{h}.|There was once a {trait} {kind} called {h}, who lived {home}.|Everyone in {place} knew {h}, the"
        " {trait} {kind}.|Long ago, in {place}, a {kind} named {h} lived {home}.|A {trait} {kind} named {h} "
        "lived {home}, not far from {water}.|If you had walked along {path} in those days, you would have met"
        " {h}, a {trait} {kind}.|In a corner of {place}, {home}, lived {h.as}.|Nobody in {place} was as "
        "{trait} as a {kind} named {h}.]"
    ),
    "day": (
        "[One {weather} {season} day, a {trait} {kind} named {h} sat by {water} and thought.|It was {season} "
        "in {place}, and a {trait} {kind} named {h} was out of bed before the sun.|The {season} sun had just "
        "come up over {hill} when a {kind} named {h} opened one eye.|On a {weather} {season} day in {place}, "
        "a {kind} named {h} looked out at the world.|It was a {weather} {season} in {place}, where {h.as} "
        "lived {home}.]"
    ),
    "who": (
        "[{traitline}|{quirk}|{traitline} {quirk}|{traitline}|{h} liked {food}, {weather} {season} days and "
        "good company.]"
    ),
    "sleep": (
        "[||||That night {night}, and {h} [fell asleep with a smile|slept better than ever|was asleep before "
        "the moon was up].|In the evening they all ate {food} together, and {night}.|That evening {h} and {f}"
        " sat together {by_spot}, and {night}.|{h} went home along {path}, tired and [happy|glad|warm all the"
        " way through].|And later, when {night}, {h} was still smiling.|That evening {h} ate two helpings of "
        "{food} and [went to bed happy|told the whole story twice]."
        "|It had been a long day[, and a good one|, and a good one|, but a good one| – and a good one].]"
    ),
    "once2": (
        "[Once upon a time there was a {trait} {kind} named {h}.|Once upon a time a {trait} {kind} was called"
        " {h}.|There was once a {trait} {kind} named {h}.|{h} was a {trait} {kind}.|Have you heard of {h}, "
        "the {trait} {kind}?|Long ago there was a {trait} {kind} whose name was {h}.|This is the story of "
        "{h}, a {trait} {kind}.|Not far from here, and not long ago, there was a {trait} {kind}. {His} name "
        "was {h}.]"
    ),
    "sad2": ("[{h} was frightened.|{h}'s heart grew heavy.|{h} felt very much alone.|How unhappy {h} was!]"),
    "glad2": (
        "[How proud {h} was!|{h} was tired and happy.|{h} had never been so happy.|{h} felt ten times as big "
        "as before.]"
    ),
    "small": ("[little creature|tiny listener|good listener]"),
    "glad": (
        "[{h} laughed out loud.|{h} felt as light as a feather.|{h} felt warm from {his} nose to {his} "
        "toes.|{h}'s heart gave a happy jump.|{h} could not stop smiling.|{h} did a little dance on the "
        "spot.]"
    ),
    "sad": (
        "[{h} sat down and felt very small.|A tear ran down {h}'s nose.|{h}'s heart sank like a stone.|{h} "
        "wanted to go home and hide under the blanket.|{h} did not know what to do.|{h} swallowed hard.|{h} "
        "sighed a long, long sigh.]"
    ),
    "think": (
        "[{h} thought about it for a while.|{h} sat down {by_spot} and thought.|{h} scratched {his} head.|{h}"
        " thought so hard that {his} ears tingled.|For a long moment {h} said nothing.]"
    ),
    "yes": (
        '["Of course," said {h}.|"Gladly," said {h}.|{h} nodded.|"Yes," said {h} at once.|"With all my '
        'heart," said {h}.]'
    ),
}

# The plots. Each is a template, then its cases: blocks of "slot: text" lines for the facts that belong together.

LOST = """
{~open} {~who} [More than anything, {h} loved {his} {item}.|Of all {his} things, {he} loved {his} {item} the
most.|{h}'s dearest treasure was a {item}.] [{dear}|]

But one {weather} [morning|afternoon], the {item} was gone. {h} looked [under the bed|behind the stove|in every
cup|under the rug], [and then in all the places where {he} had already looked|and then outside along {path}|and even
inside {his} own boots]. {~sad}

[{F.intro} came to help.|Luckily, {f.intro} came by just then.|{h} ran to tell {f.intro}.] ["[When did you last have
it?|Where did you go yesterday?]" asked {f}. "[I had it by {water},|I went down {path} to {water},]" said {h}.|"[We
will find it,|Two can look better than one,]" said {f}.] [So they searched along {water}|They looked behind every
stone by {water}], but they found only [an old boot|a rusty spoon and a surprised frog|three snails and a bent nail].

Then [{h} noticed something|{f} stopped|they both stood still]. {clue} They followed it [quietly|step by step|as
quietly as they could] to {nook}, and there was {keeper}. {found}

"[That is mine,|Please, that belongs to me,|Oh! That is what I have been looking for,]" said {h}. "[I did not know it
was yours,|I am sorry. I found it lying on the path,|Oh dear. I thought nobody wanted it,]" said {keeper2}. "{why}"
[{~think}|] {swap}

[So {h} had the {item} back, and a new friend as well.|And that is how {h} found two things in one day: a lost {item}
and a friend.|"I lost one thing and found two," {h} told {f}.|From then on {h} went to visit {keeper2} every week.]
{~sleep}
"""

LOST_CASES = """
item: [silver button|little brass bell|shiny tin star]
dear: [It had come from {his} grandfather's best coat.|It had been a birthday present, and {he} polished it every
  Sunday.]
clue: [Something winked in the sun, high up in {tree}.|A bright spark flashed among the leaves of {tree}.]
nook: the top of {tree}
keeper: a magpie
keeper2: the magpie
found: [The {item} hung over the nest like a tiny sun.|In the nest, among bits of glass, lay the {item}.]
why: My nest is so dark, and I wanted one bright thing in it.
swap: [{h} ran home and came back with a piece of mirror.|{h} gave the magpie a shiny new spoon instead.] "[This is
  even brighter,|This will catch the whole sun,]" {he} said. The magpie [bowed|clapped its wings] and gave the {item}
  back.

colour: [blue|red|green]
item: {colour} woollen [mitten|scarf|sock|cap]
dear: [{His} grandmother had knitted it by the fire.|It was the softest thing {he} had ever owned.]
clue: [A {colour} thread was caught on a thorn, and another one further on.|On the path lay one bit of {colour} wool,
  and then another.]
nook: a hole under {tree}
keeper: a mother shrew with five babies
keeper2: the mother shrew
found: The babies were asleep, all five of them, inside the {item}.
why: My little ones were so cold in the night.
swap: [{h} looked at the five tiny noses.|One of the babies sneezed.] "[Wait,|Let them sleep,]" {he} whispered, and
  {he} ran home and came back with a [warm blanket|basket of soft hay]. Now the babies had a better bed, and the
  mother shrew gave the {item} back, neatly folded.

item: [wooden whistle|little reed flute]
dear: [{He} had carved it {self}, and it could play three notes.|When {he} played it, even the sparrows stopped to
  listen.]
clue: [From far away came a thin, squeaky note.|Somebody was playing three notes, all of them wrong.]
nook: the reeds by {water}
keeper: a young heron
keeper2: the heron
found: The {item} was in its long beak, and it was blowing with all its might.
why: I have no song of my own, and I wanted one so badly.
swap: "[You hold it too tightly,|You must blow gently,]" said {h}. [All afternoon they practised together.|{h} showed
  the heron how to do it.] Before dark the heron could whistle with nothing but its own beak.

item: [red ball|striped rubber ball]
dear: [It bounced higher than any other ball in {place}.|{He} had won it by guessing the weight of a pumpkin.]
clue: [They heard it: bump, bump, bump, and then a splash.|There were round marks in the mud, all in a row.]
nook: the far side of {water}
keeper: a very small puppy
keeper2: the puppy
found: The {item} lay between its paws, a little wet but quite whole.
why: Nobody ever plays with me, so I thought the ball had come to ask.
swap: "Then it was a clever ball," said {h}. [They threw it and chased it until they were out of breath.|All three of
  them played until the shadows were long.]

item: [picture book|little notebook|book of maps]
dear: [{He} knew every page of it by heart.|It had a blue ribbon to mark the best page.]
clue: [From behind a wall came a low voice, spelling out words.|Someone was reading aloud, very slowly, one word at a
  time.]
nook: the old shed behind {hill}
keeper: a donkey
keeper2: the donkey
found: It was bending over the {item} and turning the pages with its nose.
why: I wanted to learn to read, but I only know the letter O.
swap: "[Then you know one already,|O is a very good letter,]" said {h}, "and there are only twenty-five more." [Every
  day after that they learned a new letter together.|They began with A that same afternoon.]

colour: [yellow|green|orange]
item: {colour} umbrella
dear: [It made even the rain feel like a game.|It was big enough for {him} and two friends.]
clue: [Something {colour} moved behind the bushes.|A bit of {colour} showed between the leaves.]
nook: a puddle behind {spot}
keeper: an old toad
keeper2: the toad
found: The {item} was floating upside down like a boat, and the toad sat in the middle of it.
why: All my life I have wanted to be a captain.
swap: {h} laughed. "[Every captain needs a proper ship,|I know a better ship,]" {he} said, and {he} [built the toad a
  boat from a wooden bowl|gave the toad an old wash tub with a paper sail].
"""

QUARREL = """
{~open} [{~who}|] {His} best friend was {f.as}, and the two of them did everything together.

[One {weather} {season} morning|One day] they {plan}. [At first all went well.|They sang while they worked.|] Then
they came to the question of {matter}. "{mine}" said {h}. "{yours}" said {f}. [{h} stamped {his} foot.|{f} turned red
up to {f.his} ears.|Their voices grew so loud that the birds flew up from {tree}.|"You always want to decide!" "And
you never listen!"] {broke}

"[I do not need you,|I can do it better alone,]" said {h}. "[Good!|Fine!]" said {f}, and {f.he} went home [without
looking back|and shut the door with a bang]. So {h} tried it alone. {alone} [{~sad}|It was very quiet
{by_spot}.|Nobody laughed at {his} jokes.] And on the other side of {hill}, {f} {alone2}, and {f.he} was not happy
either.

[The next morning|After a long day|After two long days] {h} [took a deep breath and set off along {path}|packed a
basket and went to see {f}|went to look for {f}]. Halfway there {he} met {f}, who was [coming to see {him}|on {f.his}
way to {him}]. "I am sorry," they both said [at the same moment|together], and then they [had to laugh|both began to
giggle]. ["Your idea was not so bad," said {h}. "Neither was yours," said {f}.|"I thought about what you said," said
{h}. "And I thought about what you said," said {f}.|"It was too quiet without you," said {h}. "It was," said {f}.]

{both} [After that they still quarrelled now and then, but never for longer than it takes to eat a plum.|"Being right
is nice," said {h}, "but being together is nicer."|They had learned that two ideas can fit together like two
hands.|"Next time," said {f}, "let us begin with sorry."|A friend is worth more than the last word.] {~sleep}
"""

QUARREL_CASES = """
plan: [wanted to build a kite|sat down to make the biggest kite in {place}]
matter: the tail
mine: The tail must be long and red!
yours: No, short and blue flies better!
broke: They both pulled, and the paper tore right across.
alone: [The kite went up, turned over twice and fell into a bush, because there was nobody to hold the string.|{He}
  ran and ran, but nobody was there to throw the kite into the air.]
alone2: had string but no kite
both: [They mended the paper and made a tail that was red at the top and blue at the end.|The new kite had two tails,
  one long and red, one short and blue.] It flew higher than {tree}.

plan: [built a den|began to build a den of branches] under {tree}
matter: the door
mine: The door must look at {water}!
yours: No, it must look at {hill}!
broke: Somebody kicked a branch, and the whole roof came down.
alone: [{He} held up one wall, and the other fell.|Whenever {he} fetched a new branch, the old ones slid away.]
alone2: sat among a heap of sticks
both: They built the den again, with [one door for {water} and one for {hill}|two doors, and the breeze blew right
  through it]. It was the best den in {place}.

plan: [baked a plum cake|made a plum cake for the two of them]
matter: the last slice
mine: I picked the plums!
yours: But I stirred the bowl!
broke: They both grabbed the plate, and the slice fell face down on the ground.
alone: [{He} baked another cake, but it came out as flat as a hat.|{He} forgot the sugar, and there was nobody to
  remind {him}.]
alone2: tried a cake too, and burned it
both: They baked the cake again, and [one of them cut it while the other one chose|this time they gave the last slice
  to a hungry sparrow].

plan: [learned a song for the {season} fair|wanted to play at the {season} fair], {h} with a drum and {f} with a
  fiddle
matter: who should begin
mine: The drum goes first!
yours: The fiddle always goes first!
broke: They both played as loudly as they could, and a string snapped.
alone: [{He} drummed and drummed, but it sounded only like rain on a bucket.|A drum by itself, {he} found, is mostly a
  noise.]
alone2: played a thin little tune that nobody could dance to
both: At the fair they began [on the very same beat|together, on the count of three], and {folk} danced until their
  shoes were dusty.

plan: [found an old map in a bottle|found a map with a red cross on it]
matter: which way to go
mine: Left, past {spot}!
yours: Right, over {hill}!
broke: Each of them held on to a corner, and the map tore in two.
alone: [With half a map {he} walked in a circle and came back to the start.|{His} half showed the path, but it did not
  show the end of it.]
alone2: had the half with the cross, but not the path
both: They laid the two halves side by side and followed them to a [tin box full of marbles|jar of old gold buttons].
  There was an even number, so they each had half.

plan: [made a boat from an old wash tub|painted an old wash tub to make a boat]
matter: who was captain
mine: I am the captain, because I found the tub!
yours: I am the captain, because I made the sail!
broke: They both jumped in at once, and the tub tipped over and filled with mud.
alone: [{He} paddled on one side only, and the tub went round and round.|With one paddle the boat only turned in
  circles.]
alone2: had a fine sail and nothing to sail in
both: They agreed to be captain [in turns, one each day|one on the way out and the other on the way home], and they
  crossed {water} without getting one toe wet.
"""

FEAR = """
{~open} [{~who}|] [There was one thing {h} was afraid of|Only one thing frightened {him}|{h} had a secret that {he}
told to nobody: {he} was afraid of something], and that was {fear}. {shows}

"[Everyone is afraid of something,|You do not have to be big to be brave,|I was afraid of that too, once,|The trick is
to take one small step,|When you are afraid, count to three and breathe,]" {e} told {him}. "[Perhaps tomorrow,|Maybe
when I am bigger,|I will think about it,]" said {h}[, looking at {his} feet|].

Then, one {weather} {season} {time}, {event} [There was nobody else near.|Everyone else was far away.|]
"[Help!|Please, somebody!|Is anyone there?]" called {f}.

{h}'s knees [shook|knocked together|felt like jelly]. {first} [{h} almost turned back.|{h} wanted to run home.|] [But
then {he} heard {f} call again, more softly.|But {f} was {his} friend.|But then {he} remembered the words of {e}.] "[I
am coming,|Wait for me,|Hold on,]" said {h} in a very small voice. {trick}

{deed} "[You came!|I knew you would come!|Oh, {h}, thank you!]" said {f}. "[I was so frightened,|I was afraid,]" said
{h}. "[But you came anyway,|And still you came,]" said {f}[, and hugged {him} hard|].

[When {e} heard the story, {e} smiled and said, "That is what brave means."|After that {h} was still a little afraid,
but never again too afraid.|{h} found that a fear gets smaller when you walk towards it.|"It was not gone," {h} said
later, "but it was smaller than I was."] {after} {~sleep}
"""

FEAR_CASES = """
fear: the dark
shows: [Every night {he} lit three candles and looked under the bed twice.|{He} never went to bed without a lamp.]
time: evening
event: {f.intro} went down into the old cellar to fetch apples, and the door fell shut. The latch was broken, and the
  lamp had gone out.
first: The stairs went down into the dark like a throat.
trick: [{He} sang a song, one line for every step.|{He} counted the steps aloud: one, two, three, all the way to
  twelve.]
deed: At the bottom {he} felt along the wall, found the latch and lifted it. [The door swung open.|Out came {f}, with
  apples in {f.his} arms.]
after: [After that one candle was enough.|Sometimes {h} even put out the light {self}, to see the stars better.]

season: summer
fear: deep water
shows: [{He} never went further into {water} than {his} ankles.|When the others swam, {he} guarded the towels.]
time: afternoon
event: {f.intro} was sitting in a little boat on {water}, and the rope slipped loose. The boat drifted out and began
  to leak.
first: The water looked very wide and very dark.
trick: [{He} held tight to a big log, kicked with {his} legs and looked only at the boat.|{He} took a long plank under
  {his} arms, and the plank carried {him}.]
deed: Kick by kick {he} came to the boat, took the rope in {his} teeth and [pulled it back to the bank|towed it slowly
  home].
after: [That {season} {h} learned to swim properly.|The next day {h} went in up to {his} chin, just because {he}
  wanted to.]

season: summer
fear: thunder
shows: [When it rumbled, {he} crept under the bed with a pillow on {his} head.|At the first rumble {he} hid in the
  cupboard.]
time: afternoon
event: a great storm came up over {hill}. {f.intro} had been picking berries there, and now {f.he} was stuck under a
  fallen branch.
first: The thunder cracked so loudly that the cups jumped on the shelf.
trick: [{He} put wool in {his} ears and ran.|At every crack {he} shouted "Boo!" right back at the sky, and that
  helped.]
deed: {He} found {f} under the branch and lifted it [with a pole|with all {his} strength], and together they ran home
  through the rain.
after: [The next time it thundered, {h} stood at the window and counted.|The next time the sky rumbled, {h} only said,
  "Bless you."]

fear: the high bridge
shows: [It swung in the wind and was made of thin grey boards.|Rather than cross it, {he} walked an hour the long way
  round.]
time: morning
event: {f.intro} twisted {f.his} ankle on the far side of the bridge, and the rain was coming.
first: The boards creaked, and far below the water foamed.
trick: [{He} did not look down. {He} looked only at {f}, and put one foot before the other.|{He} held the rope and
  gave every board a name: Anna, Bertha, Carl.]
deed: On the other side {he} tied up the ankle with {his} scarf, and [side by side|arm in arm] they came back over the
  bridge, slowly, board by board.
after: [Soon {h} crossed it every day and said hello to every board.|From the middle, {h} noticed, you could see all
  of {place}.]

fear: singing in front of others
shows: [Alone {he} sang like a lark, but when anyone came, {he} closed {his} mouth.|{He} sang only in the bath, with
  the door shut.]
time: evening
event: thick fog rolled in, and {f.intro} was out in it and could not find the way home. A lamp was no use in such a
  fog.
first: {He} knew that a song carries further than a light, but {folk} were standing all along {path}.
trick: [{He} closed {his} eyes and pretended to be in the bath.|{He} took a breath that went down to {his} toes, and
  sang one thin note, and then a stronger one.]
deed: The song went out into the fog like a rope, and along it came {f}, [step by step|closer and closer], until they
  stood face to face.
after: [{Folk} clapped until their hands were sore.|At the next feast {h} sang two songs, and the second one was
  funny.]

e: [the old ferryman|the miller]
fear: geese
shows: [They hissed and they ran, and they always seemed to run at {him}.|When {he} saw a white feather, {he} took
  another road.]
time: morning
event: {f.intro} fell into the mud by {water}, and nine angry geese stood round {f.him} in a ring.
first: The biggest goose stretched out its neck and hissed.
trick: [{He} made {self} tall, spread {his} coat and walked slowly forward.|{He} remembered that geese love bread, and
  {he} had a crust in {his} pocket.]
deed: [One goose stepped back, and then another.|The geese looked at {him}, and looked at each other, and let {him}
  through.] {h} pulled {f} out of the mud, and they walked away without running.
after: [Soon {h} greeted the geese politely, and they greeted {him} back.|The biggest goose even followed {h} to the
  market.]
"""

BUILD = """
{~open} [{~who}|] [One day {h} had a great idea.|{h} had a plan.|] "I am going to build {a_thing}," {he} said.
[[{Folk} shook their heads.|Some of {folk} laughed.] ["Do you know how?" asked {e}. "[Not yet,|I will find out,]" said
{h}.|"[You are too little for that,|That is much too hard for you,]" said {e}. "We shall see," said {h}.]|]

So {he} gathered {stuff}, and {he} [worked from morning until night|worked all day with {his} sleeves rolled
up|carried and heaved and puffed until the sun went down]. [At last it was ready.|The next day it was done.|] {try1}
{fall1} {~sad}

[{h} did not give up. {He}|The next day {h} began again and] {try2}. [But it was no better.|It held a little
longer.|That looked stronger.] Then {fall2} "[I am no good at building,|It will never work,]" said {h}.

[{F.intro} sat down next to {him}.|Just then {f.intro} came along {path}.|{F.intro} had been watching from {spot}.]
"[Why did it fall?|What did it do just before it broke?|Which part broke first?]" asked {f}. {~think} "[I see it
now,|I know,|I think I know,]" {he} said slowly. "{reason}" "Then let us try {idea}," said {f}. [They worked side by
side, and they did not hurry.|{f} held things steady, and {h} did the rest.|This time they measured everything twice.]

{good} [Nobody laughed now.|Even {e} came to look, and nodded twice.|"Well," said {e}, "that is good work."] "[It fell
down twice,|We had to fail twice first,]" said {h} proudly, "[and each time it told us something.|or I would not know
how to do it.]" {~sleep}
"""

BUILD_CASES = """
season: summer
a_thing: a raft
stuff: logs and string
try1: {h} pushed the raft into {water} and jumped on.
fall1: [It sank up to {his} knees.|The string came loose, and every log swam its own way.]
try2: used twice as much string and fewer logs
fall2: the raft tipped over, and {he} had to swim to the bank.
reason: It tips because all the weight is on one side.
idea: two empty barrels, one on the left and one on the right
good: The new raft floated as calmly as a duck, and they sailed all the way across {water}.

a_thing: a tower of stones, as high as {tree}
stuff: every stone {he} could carry
try1: {h} stood back to admire the tower.
fall1: [A sparrow sat down on top, and the whole tower fell.|The wind blew once, and the stones rolled down {hill}.]
try2: chose smaller stones and piled them up faster
fall2: the tower leaned, and leaned, and lay down like a tired cow.
reason: It falls because the bottom is as thin as the top.
idea: the biggest stones at the bottom and the little ones on top
good: The new tower stood wide and steady, and from the top you could see the whole of {place}.

a_thing: a little house in {tree}
stuff: boards, nails and an old window
try1: {h} climbed in and sat down for tea.
fall1: [The floor went crack, and the tea came down first.|The whole house slid sideways and landed in a bush.]
try2: used longer nails
fall2: a gust of wind rocked the branch, and down it came again.
reason: The branch moves in the wind, but my house does not.
idea: ropes that can give a little, instead of nails
good: Now the house swayed gently when the branch swayed, and there was room in it for two chairs and a cat.

season: winter
a_thing: a house of snow
stuff: heaps of fresh snow
try1: {h} crept in through the little door and sat down.
fall1: [The roof fell on {his} head, and only {his} nose looked out.|Flump! The roof became the floor.]
try2: made the roof thicker
fall2: the walls bent under it, and it all came down with a sigh.
reason: A flat roof is too heavy in the middle.
idea: a round roof, like half an egg
good: They laid block on block in a ring until the last one closed the top. Inside, one candle was enough to make the
  whole house glow.

season: summer
a_thing: a bridge over {water}
stuff: branches and planks
try1: {h} walked out on the bridge, one step, two steps, three.
fall1: [On the fourth step it broke, and splash!|The planks bent, and {he} sat in the water up to {his} ears.]
try2: laid two layers of planks
fall2: it sagged in the middle and floated away.
reason: There is nothing to hold it up in the middle.
idea: a strong post in the middle, where the water is shallow
good: The new bridge did not even creak, and {folk} on one side could visit {folk} on the other without getting wet.

a_thing: a cart with four wheels
stuff: an old box and four round slices of wood
try1: {h} sat in the cart at the top of {hill} and let go.
fall1: [Halfway down, a wheel rolled past {him}.|The cart went left, the wheels went right, and {h} went into the
  hay.]
try2: nailed the wheels on tightly
fall2: the wheels did not turn at all, and the cart slid down on its nose.
reason: The wheels must be held, but they must also turn.
idea: a round stick right through the box, with butter on it
good: The cart rolled down {hill} as smoothly as a song, and after that it carried everybody's apples to market.
"""

STRANGER = """
{~open} [{~who}|] [One {season} day there was news in {place}.|One {weather} {season} evening, a stranger came to
{place}.] {who} ["[Have you heard?|Be careful!]" [{folk} told one another|said one neighbour to the next].|{Folk}
whispered {by_spot}.] "{rumour1}" "[Yes, and|And I heard that|And they say that] {rumour2}" [Doors were
locked.|Curtains were pulled shut.|The little ones were called indoors.|]

[A few days later|On the third day], {h} {mishap} {~sad} Then a shadow fell across {path}. It was the stranger! {h}
wanted to run, but [{his} legs would not move|there was nowhere to go]. "[Are you hurt?|Do you need help?|May I help
you?]" asked the stranger. The voice was [soft and slow|warm, like soup|quiet and a little shy].

{help} "[I thought that you were dangerous,|I was afraid of you,]" said {h}. [The stranger looked sad.|] "[I
know,|They all run away,|Nobody ever asks me,]" said the stranger. "{truth}" {h} [felt ashamed|turned red|had to
smile]. "[Come and have some {food} with me,|Come home with me and eat some {food},]" {he} said.

[They talked until the sun went down.|{h} laughed, and the stranger laughed too.|] The next morning {h} [went from
door to door|told {f.intro}, and they went from door to door] and said, "[Come and meet my friend.|We were all
wrong.]" [First came one, then two more, and then everybody.|One by one, {folk} came out.|"Are you sure?" they asked.
"Quite sure," said {h}.] {gift}

["A stranger," said {h}, "is only a friend whose name you do not know."|And nobody in {place} locked the door after
that.|{Folk} were a little ashamed, but they were much happier.|From then on, when somebody new came to {place}, {h}
was the first to say hello.] {~sleep}
"""

STRANGER_CASES = """
world: wood
without: bear
who: [It was a great brown bear with a sack on its back.|A bear had moved into the empty cave, a bear as big as a
  haystack.]
rumour1: It growls all night long!
rumour2: its sack is full of bones!
mishap: slipped on {hill} and got one foot stuck between two rocks.
help: The bear lifted the rock [with one paw|as if it were a pillow], and {h} was free.
truth: I growl at night because I snore. And my sack is full of wooden spoons. I carve them.
gift: Soon every kitchen in {place} had a [beautiful|fine] new wooden spoon.

world: wood
who: [It was a tall grey heron with one yellow eye.|A heron came, and it stood for hours by {water} without moving.]
rumour1: It stands there and chooses whom to eat!
rumour2: it only has one leg!
mishap: fell into {water} where it was deep.
help: The heron reached down with its long beak and set {h} gently on the grass.
truth: I stand still because I am making up poems. And I have two legs. One of them is warming up.
gift: Every Sunday now, the heron read poems {by_spot}, and even the fish came to listen.

world: wood
who: [It was an old wolf with a patched coat.|A wolf was living behind {hill}, old and grey and thin.]
rumour1: It howls at the moon!
rumour2: it has the longest teeth in the world!
mishap: lost the way in the fog and walked in circles until it was nearly dark.
help: The wolf walked ahead, sniffing, and led {h} safely back to {path}.
truth: I howl because I like to sing, and I have only three teeth left. I mostly eat porridge.
gift: The wolf was asked to sing at the {season} feast, and it sang the low notes that nobody else could reach.

world: child
who: [A tall woman in a black coat had moved into the empty house by {water}.|It was a woman with a black hat, a black
  bag and a black cat.]
rumour1: There is green smoke coming from the chimney!
rumour2: at night you can hear something boil!
mishap: fell from {tree} and cut one knee.
help: The stranger opened the black bag and took out a clean bandage and a pot of sweet-smelling cream.
truth: I am a doctor. I boil herbs at night, and the smoke is only mint.
gift: That {season} nobody in {place} had a cough for longer than a day.

world: child
who: [It was a big man with a long red beard and a wagon with no windows.|A wagon stood by {water}, and beside it sat
  a giant of a man.]
rumour1: There are strange noises in the wagon!
rumour2: there are eyes, many eyes, looking out!
mishap: broke the wheel of the milk cart, and all the cans rolled down {hill}.
help: The big man caught the cans, one after another, and mended the wheel with a hammer no longer than a thumb.
truth: I mend dolls and clocks and puppets. The eyes are glass, and the noises are only cuckoos.
gift: That evening there was a puppet play {by_spot}, and {folk} laughed until they cried.

world: child
who: [A boy had come on the evening boat without saying one word.|It was a boy with a suitcase and not one word to
  say.]
rumour1: He is too proud to talk to us!
rumour2: he has something alive in that suitcase!
mishap: was out with the kite when it flew into the very top of {tree}.
help: The boy put down the suitcase, climbed up as quickly as a cat and brought the kite back whole.
truth: I do not know your words very well. And in my suitcase I have a tortoise. Do you want to see?
gift: {Folk} taught the boy ten new words every day, and the boy taught them how to race a tortoise very slowly.
"""

RACE = """
{~open} [{~who}|] [In those days the|The] fastest runner in {place} was {f.as}. "[Nobody can beat me,|I am as fast as
the wind,|I could win with one shoe,]" said {f} [at least ten times a day|to anyone who would listen].

Every {season} there was a great race, from {spot} over {hill} and back again, and the prize was {prize}. "[I am going
to run too,|This time I will try,]" said {h}. "[You will be back by supper time,|You could not beat a snail,|I will
wave to you from the end,]" said {f}. {h} [said nothing, but {he} tied {his} laces twice|felt {his} ears grow hot|went
out every morning and practised].

[On the day of the race|At last the day came, and] {folk} stood on both sides of {path}. "Ready? Steady? Go!" [called
{e}|cried {e}]. [Off went {f} like an arrow.|{f} shot away in a cloud of dust.] {h} ran [at {his} own pace|steadily
and did not look left or right|and puffed and kept on running].

On the other side of {hill}, {h} [heard a cry|heard someone calling]. {trouble} [The finish was so near now.|Now {h}
was in front.|If {h} ran on, {he} would win.] But {h} stopped. "[Hold still,|Let me help you,|Wait, I am here,]" {he}
said. {rescue}

"[Why did you stop?|You could have won,]" said {f}. "[A prize is only a prize,|I would rather win when you are running
too,|I could not have enjoyed it,]" said {h}. "[I am sorry I laughed at you,|I have been silly and proud,]" {f.he}
said. [They ran the last part side by side|Arm in arm they came down {hill}|Together they walked to the end], and they
crossed the line at the very same moment.

[{Folk} cheered.|"Well!" said {e}. "Two winners!"] {share} [And {f} never boasted again, or at least not before
breakfast.|"Fast is good," {e} said, "but kind is better."|The next year they both ran again, and nobody remembers who
won.] {~sleep}
"""

RACE_CASES = """
prize: a golden pumpkin pie
trouble: {f} was stuck in the mud up to {f.his} waist, and {f.he} was sinking slowly.
rescue: {He} laid a long branch across the mud and pulled and pulled, and with a loud plop {f} came out.
share: They cut the pie into so many pieces that everybody had one.

prize: a blue ribbon and a jar of honey
trouble: There sat {f} with a long thorn in {f.his} foot.
rescue: {He} [took hold of the thorn and pulled it out in one go|drew out the thorn very gently] and tied a leaf
  around the foot.
share: They cut the ribbon in two, and the honey went round from spoon to spoon.

prize: a silver whistle
trouble: {f} had taken a short cut, and now {f.he} hung by {f.his} belt from a thorn bush.
rescue: {He} [bent the branches aside, one by one|climbed up and undid the belt], and {f} tumbled down on the grass.
share: They took turns with the whistle, and {folk} wished the prize had been a quiet one.

season: summer
prize: a basket of ripe cherries
trouble: The bank had crumbled, and {f} was clinging to a root above {water}.
rescue: {He} lay down flat, reached out with {his} scarf and pulled {f} up bit by bit.
share: They ate the cherries together and spat the stones as far as they could, and for once {h} won.

prize: a big round cheese
trouble: {f} had run so fast that {f.he} had missed the turn, and now {f.he} was lost among the brambles.
rescue: "Follow my voice," {he} called, and {he} sang loudly until {f} found the way out.
share: The cheese was so big that they rolled it home, and they ate it for a whole week.
"""

PROMISE = """
{~open} [{~who}|] One {weather} {season} morning, {e} [knocked at the door|came to see {him}]. "[I am going on a
journey,|I must go away for a while,]" said {e}. "{ask}" "[I promise,|You can count on me,]" said {h}, and {he} meant
it.

[For two days all went well.|The first day {he} did it, and the second day too.] But on the third day {f.intro} came
running. "{tempt}" said {f}. ["But I have a promise to keep," said {h}. "[It will only take a minute,|Just this
once,]" said {f}.|] So {h} went along. {fun} [A minute became an hour, and the hour became a whole day.|]

[When the sun was low,|In the evening,|On the way home,] {h} suddenly remembered. {He} ran along {path} as fast as
{he} could[, but it was too late|]. {harm} "[I could say that it was the wind,|I could say nothing at all,|Perhaps
nobody will notice,]" thought {h}. But that thought felt [like a stone in {his} shoe|cold and heavy].

[When {e} came home|As soon as {e} was back], {h} told the whole story, [from beginning to end|and left nothing out].
"[I broke my promise, but I want to make it good,|I forgot, and I am sorry. What can I do?]" {he} said. "[That was
hard to say,|It would have been easier to tell a lie,]" said {e}. "[Let us see what can be saved.|Thank you for the
truth.]" {mend} [{f} came to help too, for {f.he} was sorry as well.|] [It took a long time, but {h} never missed a
day.|]

{saved} ["Can I still count on you?" asked {e}. "Now you can," said {h}.|"May I ask you again?" said {e}. "Yes, and
this time I know what it means," said {h}.|] [A promise is a small thing to say and a big thing to keep.|A mended
promise, {he} found, can be stronger than a new one.|And {he} tied a knot in {his} handkerchief, just to be sure.]
{~sleep}
"""

PROMISE_CASES = """
season: summer
ask: Will you water my [beans|roses] every day until I come back?
tempt: Come quickly! There is a circus on the other side of {hill}!
fun: They saw an elephant on a ball and a man who juggled plates.
harm: The leaves hung down like wet socks, and the ground was as hard as a plate.
mend: Every morning and every evening {h} carried water from {water}, and at noon {he} held up a cloth to make shade.
saved: Then one day a tiny green leaf came out, and after it came another.

season: summer
ask: Will you feed my hens and shut the gate every night?
tempt: The plums are ripe by {water}! Come and pick some!
fun: They ate plums until their chins were purple.
harm: The gate stood wide open, and all seven hens were gone.
mend: They searched the bushes with a lantern and a bag of corn. {h} found one hen under a barrow, one in {tree} and
  one in a hat.
saved: On the last day the seventh hen walked home by itself, with nine yellow chicks behind it.

ask: Will you keep the big lamp by {water} burning each night, so that the boats can see it?
tempt: There is music and dancing {by_spot} tonight!
fun: They danced until the band had no breath left.
harm: The lamp was dark, and a little boat had bumped into the rocks. Nobody was hurt, but there was a hole in its
  side.
mend: {h} helped to saw new boards and to paint them blue, and every night {he} sat beside the lamp and kept it
  bright.
saved: When the boat slid back into the water, the boatman had painted a name on it: Second Chance.

ask: Will you wind the big clock every evening, so that it never stops?
tempt: Come and fly my new kite! The wind is perfect!
fun: The kite went so high that it looked like a comma.
harm: The clock had stopped at five. Nobody knew what time it was, supper was burned, and the ferry had left without a
  soul on board.
mend: Until the clockmaker came, {h} went from door to door every hour and told everyone the time, even at night.
saved: When the clock struck again, {folk} came out to listen, and somebody said that they would miss the knocking.

ask: Will you take a jug of warm milk to the old cat under {tree} every day?
tempt: Come and see! They are catching a fish as long as a boat!
fun: The fish was not as long as a boat, but it was as long as a boot, and it got away.
harm: The milk stood in the jug, cold and sour, and the old cat was gone.
mend: {h} looked in every barn and under every bush, and every day {he} put down a fresh bowl and called.
saved: Then one evening the bowl was empty, and beside it sat the old cat, washing one paw as if nothing had happened.
"""

SURPRISE = """
{~open} [{~who}|] [The next day would be {h}'s birthday.|Only one more day, and it would be {h}'s birthday.] But
nobody [said a word about it|seemed to remember it].

[{h} went to see {f.as}.|{h} knocked at the door of {f.as}.] "[Shall we play by {water}?|Will you come for a walk
along {path}?]" {he} asked. "[Not today,|I am very busy,]" said {f}, and {f.he} [quickly hid something behind {f.his}
back|shut the door in a hurry]. There was {sign1} on {f.his} nose.

Then {h} went to {e}. [{E} was whispering with a neighbour, and they both stopped at once.|Behind the door somebody
giggled, and then it was quiet.] "[What are you doing?|Is something wrong?]" asked {h}. "[Nothing at all,|Nothing, oh,
nothing,]" said {e}. {sign2}

{~sad} "[They have all forgotten me,|They have a secret, and I am not in it,]" {he} said to a [beetle|snail|sparrow],
and the {~small} had no answer. {h} sat {by_spot} until [it grew dark|the first star came out].

The next evening, {h} saw {lead}. It led along {path}, past {spot} and up to {tree}. And there, all at once, a hundred
little lights [were lit|began to glow]. "[Surprise!|Happy birthday, {h}!]" shouted {folk}. {present}

"[So that is what you were hiding!|So that was the secret!]" said {h}. {f} laughed. "[I am very bad at secrets,|It was
so hard not to tell you,]" {f.he} said. "[I almost told you three times.|I had to run away or I would have told you.]"
[{~glad}|] ["A secret can look like a closed door," said {e}, "but sometimes there is a feast behind it."|{h} made a
wish, but there was nothing left to wish for.|And {h} never again thought that {he} was forgotten.] {~sleep}
"""

SURPRISE_CASES = """
sign1: a spot of [blue|red] paint
sign2: [Somebody ran past with a brush.|A pot of paint stood behind {tree}, and nobody would say why.]
lead: a trail of painted drops on the ground
present: In the middle stood a little boat, freshly painted, and on its side was the name {h}.

sign1: a smudge of flour
sign2: [All over {place} it smelled of vanilla.|Smoke came from every chimney, though it was not yet noon.]
lead: a trail of crumbs on the ground
present: In the middle stood a cake with three floors and a sugar {kind} on top.

sign1: a curl of wood
sign2: [From behind {hill} came the sound of a saw.|All day long there was hammering, and nobody would say where.]
lead: a line of wood shavings on the ground
present: From the lowest branch hung a new swing, with a seat just wide enough for two.

sign1: a wisp of wool
sign2: [Somebody ran past with a needle.|Balls of wool rolled out of doors and were quickly pulled back in.]
lead: a long red thread on the ground
present: They had all knitted one square each, and together the squares made the warmest blanket in {place}.

sign1: a speck of gold paper
sign2: [Somebody ran past with a pair of scissors.|From one window came three notes of a song, and then "Hush!"]
lead: a path of little gold paper stars
present: They had made up a play about {h}, with paper crowns and nine songs, and {e} played the dragon.
"""

STORM = """
{~open} [{His} house was the smallest in all {place}.|{h} had a very little home, with one chair, one cup and one
window.] ["One day I will have a big house," {he} often said.|"Where would you put a guest?" {folk} asked, and they
laughed kindly.|{h} sometimes wished for a bigger one.|]

One {season} evening the sky turned [black|the colour of plums|dark and yellow]. [The birds stopped singing.|Not a
leaf moved.|] [{E} looked up.|{E} stopped to listen.|{E} stood still.] "{sign}" And then it came. The wind [howled
over {hill}|tore at the doors|roared like a train], and {storm}.

Knock, knock. There stood {f.as}, wet to the skin. "{trouble}" said {f}. "[May I come in?|Is there room for me?]" [{h}
looked at {his} one chair.|] "[There is always room,|Come in, come in,|We will manage,]" said {h}. Knock, knock. There
stood {e}, with {bundle}. Knock, knock, knock! Next came [a family of ducks|a mother cat with four kittens|two old
donkeys], and then [a beetle with a suitcase|three sparrows|a very wet rooster]. [Soon there was somebody on the
table, under the table and in the sink.|They sat on the bed and under the bed, and the smallest sat in the cup.]

[Outside the storm raged, but inside it was warm.|The more they were, the warmer it was.] [{h} brought out {food}, and
everyone had some.|They shared {food}, and somehow it was enough.] {pastime} ["It is so full in here," said {e}, "that
the wind cannot blow it away."|]

[In the morning the sky was washed and blue.|When the sun came up, the storm was over.] {damage} ["We will help one
another," said {h}, and so they did, one house after another.|"Many hands are quick," said {h}, and before the week
was over everything was mended.]

[Nobody ever called the house too small again.|"It is not a small house," said {f}. "It is a house for
everybody."|"How big is your house?" a traveller once asked. "Big enough for all of us," said {h}.|{h} did not wish
for a bigger house any more.] {~sleep}
"""

STORM_CASES = """
sign: The air smells of rain. There will be a storm.
storm: the rain came down in ropes
trouble: My roof has blown off, and I saw it fly over {hill}!
bundle: a birdcage and a wet umbrella
pastime: Then {f} told the story of the roof that wanted to be a bird.
damage: Roofs lay in the grass, and shirts hung in the trees.

season: winter
sign: I can smell snow, and a great deal of it.
storm: the snow flew sideways and covered the windows
trouble: The snow has come in through my chimney and put out the fire!
bundle: a blanket and a jar of pickles
pastime: Then they all sang, first softly, and then so loudly that they could not hear the wind.
damage: The whole of {place} was white, and only the chimneys looked out.

sign: The water is rising. I have never seen it so high.
storm: {water} climbed over its banks
trouble: My bed is floating, and my shoes have sailed away!
bundle: a clock and a bag of dry socks
pastime: Then {f} made shadow pictures on the wall: a swan, a dragon and a teapot.
damage: There was mud on every floor, and a fish lay in the flower bed.

season: summer
sign: Listen how quiet it is. That is how big storms begin.
storm: the lightning wrote white letters on the sky
trouble: A tree has fallen on my house, right through the kitchen!
bundle: a fiddle under one arm
pastime: Then {e} played the fiddle, and they danced sitting down, because there was no room to stand.
damage: Branches lay everywhere, and {path} was blocked from end to end.
"""

GIFT = """
{~open} [{~who}|] [In three days {f.as} would have a birthday.|Soon there would be a {season} feast, and {h} wanted to
give something to {f.as}.] {f} was {h}'s dearest friend, so it had to be [the best present in the world|something very
special].

{h} [emptied {his} money box on the table|turned out {his} pockets]. Out fell [one coin and a button|two small coins
and a dead fly|nothing but a cork and a crumb]. In the shop window there was {wish}, but it cost [ten silver
coins|more than {h} had ever seen]. [{h} tried to earn some money. [{He} washed windows, but {he} broke one and had to
pay for it.|{He} sold lemonade by the road, but it rained all day.|{He} carried parcels, but they were too heavy for
{him}.]|{~sad}]

"[I have nothing to give,|I cannot give {f} anything,]" {he} told {e}. "[Nothing?|Are you sure?]" said {e}. "[What
does {f} need that no shop can sell?|Close your eyes and think of {f}. What do you see?]" {~think} {need} Then {h}
knew. {make} [It took two whole days.|{h} worked late into the night, with {his} tongue between {his} teeth.|{h} told
nobody what {he} was doing.]

When the day came, {f} opened big parcels with [gold paper|shiny bows]. Then {h} came last, with {parcel}. "It is only
something small," {he} said, and {his} voice shook. {reaction}

"[This is the best one of all,|Nobody has ever given me such a thing,]" said {f}. "{thanks}" {~glad} [The best gifts
cost no coins, only time and thought.|And nobody thought of the shop window any more.|"You see," said {e}, "you were
richer than you knew."|{h} understood that a gift is a way of saying, "I know you."] {~sleep}
"""

GIFT_CASES = """
wish: a [golden music box|music box with a dancing swan]
need: {F} could not sleep well, for the nights were too quiet.
make: {He} made up a song about {water} and {hill}, and {he} wrote it down with a picture for every line.
parcel: a rolled-up sheet of paper
reaction: So {h} sang the song, and when it was over, nobody moved for a moment.
thanks: I will sing it every night before I go to sleep.

wish: a [fine warm coat|coat with a fur collar]
need: {F} was always cold, even in {season}.
make: {He} gathered bits of old wool, [from fences and drawers|a little from every house], and knitted a long scarf in
  eleven colours.
parcel: a lumpy bag
reaction: The scarf went round {f.his} neck three times, and there was still some left for {h}.
thanks: There is a bit of all of {place} in it.

wish: a [painted globe|big brown telescope]
need: {F} longed to see faraway places, but {f.his} leg was weak, and {f.he} could not walk far.
make: {He} built a little wagon from a crate and four old wheels, and {he} lined it with cushions.
parcel: something large under a sheet
reaction: "Get in," said {h}, and {he} pulled {f} all the way up {hill}, where you could see to the end of the world.
thanks: I have never been so far from home, and I was never so happy.

wish: a [silver lamp|lamp of coloured glass]
need: {F} had a dark little room and missed the garden when the days were short.
make: {He} pressed flowers of every colour between two panes of old window glass.
parcel: something flat, wrapped in leaves
reaction: They hung it in the window, and when the sun shone through, the whole wall was covered with flowers.
thanks: You have given me a garden that does not fade.

wish: a [thick book with gold edges|leather book with a lock]
need: {F} loved stories, and above all {f.he} loved to be in them.
make: {He} folded paper into a book and wrote a story in it about {f}, who sailed across the sea in a tub.
parcel: a thin book tied with string
reaction: {F} read it aloud from the first page to the last, and everybody clapped.
thanks: Now I know what I will do when I grow up. I will buy a tub.
"""

SKILL = """
{~open} [{~who}|] [There was one thing {h} wanted more than anything|{h} had one great wish]: {he} wanted to learn
{skill}. "[Will you teach me?|Can you show me how?]" {he} asked {e}. "[Gladly,|Yes,]" said {e}, "[but it will take a
while.|but you must not be in a hurry.]"

On the first day {day1} [{F.intro} saw it and laughed.|{F.intro} tried not to laugh.|"Never mind," said {f.intro}.] On
the second day {day2}

On the third day {h} [threw everything into the corner|lay down on the floor|sat down and folded {his} arms]. "I
cannot do it!" {he} said. "[You cannot do it yet,|You forgot one word, and the word is yet,]" said {e}. [Then {e} told
{him} a secret.|] "{secret}"

So {h} began again. [Every morning {he} practised before breakfast.|Every day {he} practised a little.] [Some days
were good, and some were bad.|] And one {weather} {season} day, without noticing it, {h} did it. {did} "[Did you see
that?|Look! Look!]" {he} cried. "I saw it," said {e}. [{~glad}|]

It was just in time, for soon afterwards {need} {use}

"[Can you teach me too?|Will you show me how?]" asked {f}, who [was not laughing now|looked at {him} with big eyes].
"[Gladly,|Yes,]" said {h}, "[but it will take a while.|but you must not be in a hurry.]" [And {e}, who heard it,
smiled and said nothing.|Slow feet also reach the top of the hill.|Because that is how it goes: first you cannot, and
then you cannot yet, and then you can.]
"""

SKILL_CASES = """
skill: to whistle
day1: {h} blew and blew, but only air came out.
day2: there was a sound, but it was the sound of a wet boot.
secret: Do not blow hard. Think of something you love, and let the air go by itself.
did: A clear, round note came out and flew up over {tree}.
need: a little lamb was lost in the fog on {hill}.
use: {h} whistled, and whistled again, and the lamb came trotting out of the fog towards the sound.

season: winter
skill: to skate
day1: {h} sat down on the ice eleven times.
day2: {he} stayed up for three steps and then went through a snowdrift.
secret: Do not look at your feet. They know where they are. Look at the place where you want to go.
did: {He} glided from one bank to the other, as smoothly as a swan.
need: {e} fell ill on the far side of the ice, and someone had to bring medicine before night.
use: {h} put the bottle in {his} pocket and skated across in the last light, and {e} was well again by Sunday.

skill: to bake bread
day1: {h}'s loaf was so hard that it was used to hold the door open.
day2: the dough ran over the table and down to the floor.
secret: You are fighting with the dough. Be patient with it. Let it rest, and rest with it.
did: The loaf rose, round and brown, and it sounded hollow when {he} knocked on it.
need: the road was washed away, and no flour wagon or baker could come to {place}.
use: {h} baked day and night with the last sack of flour, and nobody in {place} went to bed hungry.

skill: to juggle
day1: {h} dropped every apple, and one of them fell on {e}.
day2: {he} caught one apple, but it was with {his} mouth.
secret: Begin with one. When one is easy, take two. Only a fool begins with three.
did: Three red apples went round and round in the air like a wheel.
need: the clown of the {season} fair sprained a thumb, and the little ones began to cry.
use: {h} climbed on a barrel and juggled apples, then cups, then hats, until everybody laughed again.

skill: to tie every knot there is
day1: {h} tied {his} own {hand} to the chair.
day2: {he} made such a tangle that it had to be cut with scissors.
secret: A knot is a path. Walk along it slowly with your finger, and you will not get lost.
did: The rope slid through, over and under, and there was a perfect knot.
need: the ferry broke loose in the night, with two sheep and a goat on board.
use: {h} threw a rope around a post and tied a knot that no water could pull open, and the ferry was saved.

skill: to play the fiddle
day1: it sounded as if someone were stepping on a cat.
day2: the neighbours closed their windows, and a dog began to howl.
secret: Play one note only, until it is beautiful. Then find it a friend.
did: A small sweet tune rose up, and outside a blackbird answered.
need: the old musician did not come to the {season} dance, and {folk} stood about and looked at their shoes.
use: {h} tuned the fiddle and began to play, and the shoes began to dance.
"""

SEED = """
{~open} [{~who}|] [One {season} day {e} gave {him} a seed.|One day {h} found a seed {by_spot}, and {he} showed it to
{e}.] It was [small and brown|round and black|no bigger than a crumb]. "What will it be?" asked {h}. "[Wait and
see,|You will know when it is ready,]" said {e}.

So {h} [made a hole with {his} finger|dug a little hole near {water}], put the seed in and covered it with earth. Then
{he} sat down and waited. [Nothing happened.|After ten minutes {he} said, "Are you coming?"|{He} waited until supper,
and still nothing happened.]

The next day {h} [sang to it|read it a story|shouted at it, just a little]. The day after that {he} {silly} ["What are
you doing?" asked {f.intro}. "I want it to grow faster," said {h}. "|{F.intro} laughed. "][A seed does not have
ears,|You do not grow faster either when I look at you,]" said {f}. On the fifth day {h} dug the seed up. There was a
tiny white root on it, thinner than a hair.

"Oh! It was busy all the time," said {h}, "and I disturbed it!" Quickly and gently {he} put it back. "[The most
important part happens where you cannot see it,|Good things are often busy in the dark,]" said {e}. [So now {h} gave
it water every day and left it alone.|So {h} learned to wait. {He} [swept the yard|mended {his} boots|counted the
swallows] and thought of other things.]

One morning there was [a green dot|a green tip, as small as a nail]. {grow} But one day {danger} {guard}

And then [at last|one day] {result} {h} shared everything with {f} and {e}[, and with all of {folk}|]. In the end {h}
kept one seed. [{He} gave it to a little one who asked, "What will it be?" And {h} said, "Wait and see."|{He} put it
in a box and wrote on the lid: Be patient.|"Next year," said {h}, "I will wait much better."]
"""

SEED_CASES = """
season: spring
silly: put a blanket on it and a hot water bottle.
grow: Leaves came, as big as plates, and the stem climbed up a pole higher than {h}.
danger: a storm bent it down to the ground.
guard: {h} tied it to a strong stick with a soft ribbon, and it straightened up again.
result: it opened one huge yellow flower that turned its face to the sun, and when the flower was old it was full of
  seeds.

season: spring
silly: measured the earth with a ruler, in case it was higher.
grow: It crept along the ground, through the fence and round the corner.
danger: three snails came to eat it.
guard: {h} carried the snails one by one to a heap of old lettuce, which they liked better.
result: there lay a pumpkin so big that two friends could hide behind it, and it made soup for a week.

season: spring
silly: drew the earth a picture of a tree, so that it would know what to do.
grow: It grew so slowly that {h} had to wait for the next year, and the next, and the one after that.
danger: a hungry goat came by.
guard: {h} built a fence of willow twigs around it and gave the goat a carrot.
result: there was a young tree with white blossoms, and after the blossoms came seven red apples.

season: spring
silly: told it a joke, and then explained the joke.
grow: It wound up a string, round and round, as if it wanted to climb to the moon.
danger: the sun burned, and it did not rain for three weeks.
guard: {h} carried water from {water} every evening, one can after another.
result: it was hung with long green pods, and in every pod lay six fat beans.
"""

MYSTERY = """
{~open} [{~who}|] [Then a mystery came to {place}.|It all began on a {weather} {season} {morning}.|] {strange} [The
next day it happened again.|It went on for three days.|] "[Who can it be?|What can it mean?|It is a ghost,]" said
{folk}.

"[I will find out,|There must be a reason,]" said {h}, and {he} asked {f.as} to help. "[I am not afraid of ghosts,|I
have a good nose for riddles,]" said {f}, but {f.he} [said it rather quietly|brought a big pan, just in case]. First
they {test1} {fail1}

"[Let us think,|What do we know?]" said {h}. "{know}" So when it grew dark they hid behind {spot}, with a blanket and
some {food}. [It was cold, and the shadows were long.|An owl hooted, and {f} held on to {h}'s {hand}.|They waited and
waited.] {f} had almost fallen asleep when {h} whispered, "[Listen!|Hush! Look there!]"

{seen} [{f} held {f.his} breath.|{h}'s heart beat like a drum.|] {h} lifted the lantern. {reveal} "[Oh!|So it was
you!]" said {h}. {explain} {solve}

[The next morning {h} told everyone, and {folk} laughed, and some were a little red in the face.|] [Behind most
mysteries, {h} found, there is a simple reason.|"It is better to look than to guess," said {h}.|"Shall we look for
another mystery?" asked {f}. "After breakfast," said {h}.|After that, whenever something was odd in {place}, they
said, "Ask {h} and {f}."] {~sleep}
"""

MYSTERY_CASES = """
morning: morning
strange: A pie had been put on the window sill to cool, and now the plate was empty.
test1: sprinkled flour under the window to find footprints.
fail1: But in the night it rained, and the flour turned to paste.
know: Each time one slice was left at the poorest house, so the thief must be kind.
seen: Something small and dark climbed up to the sill and lifted the pie.
reveal: It was a young raccoon with a very thin coat.
explain: "My brothers are hungry," it said, "and I only wanted to bring them some supper. I gave a slice to the poor
  house too."
solve: "[You need not steal,|You only had to ask,]" said {h}. The next day there was a table by {water} with a sign:
  Pies for all who are hungry. And the raccoon helped to bake.

morning: night
strange: Tap, tap, tap, it went in the dark, and nobody knew where it came from.
test1: listened at every wall with a glass.
fail1: But the tapping was always somewhere else.
know: It only taps when the wind blows from {hill}.
seen: Tap, tap, tap! Something moved behind the window of the empty house.
reveal: It was a woodpecker chick, and it was tapping on the glass from inside.
explain: "I flew in through the chimney," it said, "and I cannot get out. I have been knocking for days."
solve: [{h} pushed the window up|Together they pulled the window open], and the little woodpecker flew out to {tree},
  where its mother was waiting.

morning: evening
strange: A small light danced on top of {hill}, though nobody lived there.
test1: climbed {hill} by day and looked for ashes.
fail1: But there were only round marks in the grass, three of them, close together.
know: Three marks, and a light that only comes when the sky is clear.
seen: The light came up {path}, bobbing and swaying.
reveal: It was {e}, with a lantern and a long brass telescope on three legs.
explain: "I am counting the stars," said {e}. "I did not tell anyone, because I thought you would laugh."
solve: "[May we look too?|We would never laugh at that,]" said {h}. One after another they looked, and they saw the
  mountains of the moon, as clear as the back of a {hand}.

morning: morning
strange: On every doorstep lay a present: a shell, a feather or a round white stone.
test1: tied a thread across {path} to catch the giver.
fail1: But in the morning the thread was not broken, and there were presents all the same.
know: The thread was not broken, so whoever it is must come from above.
seen: There was a soft rush of wings, and a stone dropped on the step.
reveal: It was a crow with one white feather.
explain: "Last winter you all put out bread for me," it said. "I could not pay, so I bring what I have."
solve: "[You have already paid,|You do not owe us anything,]" said {h}, "but we like your presents very much." From
  then on there was always bread for the crow, and always a shell for somebody.

morning: night
strange: From the bottom of the old well came a long, low moan.
test1: let down a bucket on a rope.
fail1: But the bucket came up with nothing in it but a leaf.
know: It only moans when the wind is strong.
seen: The wind rose, and the well began to moan, and something glinted in the wall of it.
reveal: It was nothing but an old bottle, stuck between two stones.
explain: The wind blew across the neck of the bottle, and the bottle sang. "That is no ghost," said {f}. "That is a
  flute!"
solve: They collected more bottles, big ones and small ones, and hung them up in {tree}. Now, when the wind blew, all
  of {place} had music.
"""

WISH = """
{~once2} {life}

{h} had one great wish. "[If only I could {wish},|How I would love to {wish},]" {he} said [every day|to anyone who
would listen|again and again]. "{warn}" said {f.as}. "[I do not care,|I want it anyway,|You do not understand,]" said
{h}.

[One {weather} {season} night, a star fell from the sky.|One night, the moon was so round and so near that {h} could
speak to it.|One {weather} evening, an old wind came by, one of those that can do a little magic.] "[Make my wish come
true!|Please let me {wish}!]" begged {h}. "Are you quite sure?" [asked a far voice|came the answer]. "Yes!" said {h}.
And in the morning it had come true.

[Oh, how lovely it was!|At first it was wonderful.|] {joy} "[This is the life for me!|Why did I wait so long?]" said
{h}. {trouble} {~sad2} {lesson}

"[Now I know what I really want,|I did not think of that,|I miss my old place,]" said {h}. {back} {f} [was waiting|had
kept {his} place free]. "[Was it beautiful?|How was it?]" asked {f}. "[It was lovely,|It was grand,]" said {h},
"{answer}" [Sometimes a wish must come true before you can see that you do not need it.|And {h} still made wishes now
and then, but smaller ones, and with more care.|What you have is easy to forget, until you look at it from far
away.|And if you go by one {season} day, you can still see {him} there.|They laughed, and then they were quiet
together.]
"""

WISH_CASES = """
kind: snowman
name: [Flurry|Mr. Carrot|Button|Frostpot]
pro: he
season: winter
f.as: the robin
f: the robin
life: He stood in a garden, with a carrot for a nose and an old tin pot for a hat. [The children waved to him on their
  way to school.|In the morning the children greeted him, and in the evening the moon did.]
wish: see the summer
warn: Summer is warm, and you are made of snow,
joy: The grass was green, and there were red poppies, and bees hummed round his hat.
trouble: Drip, went his nose. Drip, drip, went his arms. He was growing smaller every minute.
lesson: "Your winter is somebody's summer," a bee told him. "The snowdrops dream of you all year."
back: The wind took pity and blew cold from the north, and he was back in his garden under the falling snow.
answer: but the poppies do not need me, and the children do.

kind: kite
name: [Swoop|Ribbon|Zigzag|Skylark]
pro: she
season: autumn
f.as: her string
f: the string
life: She was made of red paper, and she could climb higher than the church tower. But always, just when the sky grew
  really big, there was a tug, and she had to stop.
wish: fly without a string
warn: I do not hold you down. I hold you up,
joy: She shot up past the swallows, with nobody to say stop.
trouble: Then she turned over, and over again. Nothing held her to the wind. She tumbled down like a leaf and hung in
  a thorn bush.
lesson: "A kite needs someone who holds on," said an old crow. "Even I need the branch, or I could not take off."
back: A girl found her, patched her with blue paper and tied her carefully to her old string.
answer: but up there nobody was thinking of me.

kind: cloud
name: [Puff|Wisp|Little Grey|Fluff]
pro: it
season: summer
f.as: the old rain cloud
f: the old cloud
life: It was so small that it did not even have a shadow. It drifted over fields and roofs, and nobody looked up.
wish: be the biggest cloud in the sky
warn: Big clouds are heavy,
joy: It was as wide as a country and as tall as a mountain, and all the birds made way.
trouble: But where it went, it grew dark. Picnics were packed up, and children ran indoors. Nobody smiled at it at
  all.
lesson: Then it saw a field of thirsty little carrots. "Rain is a gift," called a farmer, "if it comes in the right
  place!" So the cloud rained, and rained, and grew smaller with every drop.
back: When the last drop had fallen, it was little and white again, and below it the field was green.
answer: but being big is nothing, and being useful is a great deal.

kind: scarecrow
name: [Straw Tom|Patch|Old Buttons|Wobble]
pro: he
season: autumn
f.as: the field mouse
f: the mouse
life: He stood in the middle of the corn with a turnip head and a torn black coat. [Whenever a bird came near, it saw
  him and flew away.|All day he waved his arms, and all the birds flew off.]
wish: have birds for friends
warn: A scarecrow with birds is no use to the farmer,
joy: Sparrows sat on his hat, and starlings told him news from the south.
trouble: But they ate and ate, and soon half the corn was gone. The farmer looked at the field and put his head in his
  hands.
lesson: "Not all fields are for eating," {h} told the birds. "Leave the corn, and in winter I will see that you have
  seeds." And the birds thought that this was fair.
back: The birds kept their word. The corn grew tall again, and the farmer was so pleased that he filled the
  scarecrow's pockets with seeds.
answer: and I found out that friends will listen if you ask them.

kind: paper boat
name: [Swan|Little Admiral|Feather|Crinkle]
pro: she
season: spring
f.as: the garden frog
f: the frog
life: She had been folded out of a page of a story, and she sailed on a puddle in the garden, from one end to the
  other and back again.
wish: sail on the great wide sea
warn: The sea is wet, and you are paper,
joy: The waves were like blue hills, and the gulls called her captain.
trouble: But the waves came over her side. The words of her story began to run, and her corners grew soft.
lesson: "Little ships are for little waters," said a kind old whale, "and a puddle is a sea, if you are the right
  size."
back: The whale blew a great puff of air, and she flew over the dunes and came down softly in her own puddle.
answer: but out there I was the smallest ship, and here I am the fleet.

kind: weathercock
name: [Goldie|Sir Crow|Captain Spin|Copper]
pro: he
season: spring
f.as: the church bell
f: the bell
life: He stood on the top of the tower and turned with every wind, now to the left and now to the right. It made him
  quite dizzy.
wish: stand still for once
warn: People look at you to know the wind,
joy: The wind blew from the west, and he looked calmly to the east. It was so restful.
trouble: But the people looked up and thought the day would be fine. They hung out their washing, and it rained. The
  boats went out, and a storm came.
lesson: "You do not turn because you are weak," said a passing stork. "You turn because you tell the truth."
back: With a creak he swung round into the wind, just in time, and the boats saw it and came home.
answer: but I would rather be dizzy and be trusted.

kind: puddle
name: [Splash|Mirror|Plop|Little Round]
pro: it
season: summer
f.as: the sparrow
f: the sparrow
life: It lay in the middle of the road, and everyone stepped over it. Only the sparrows came to wash their feet.
wish: be a great river
warn: Rivers never rest,
joy: It rushed over stones, turned a mill and carried seven ships.
trouble: But a river has to run, day and night, and it could never stay to look at anything. And no sparrow could wash
  in it.
lesson: "When I was a spring," said the river bed under it, "I was little, and I knew every blade of grass by name.
  Those were good days."
back: It ran and ran until it grew thinner and thinner, and at last it lay still in its old place in the road.
answer: but nobody can see the stars in a river, and in me there are hundreds.
"""

USEFUL = """
{~once2} {life}

[But {h} was the smallest of all.|Next to the others, {h} was very, very small.] "[What can you do?|What use are
you?|You are only a toy,]" said {big}. "{mock}" {h} [said nothing|tried to smile], but inside {he} [felt very
small|was sad]. "[One day they will need you,|Every size is good for something,|Just do your own work well,]" said
{f}, who [was old and wise|had seen a great deal]. ["Do you think so?" asked {h}. "I know so," said {f}.|]

Then, one {weather} {season} night, {crisis} {bigfail}

"[Let me try,|I can do it,|I can help,]" called {h}. "[You?|You are much too small!]" said {big}. [But there was no
time to talk.|{h} did not stop to answer.] {deed1} [{h} was afraid, but {he} did not give up.|"I am small," thought
{h}, "but I am here."||]

{deed2} [A cheer went up.|Everybody cheered.|] {~glad2}

{thanks} "[We were wrong,|I am sorry that we laughed,|Will you forgive us?]" said {big}. "[There are things that only
a small one can do,|It was good that you were so small,]" said {f}. [{h} was too happy to speak.|"I only did my work,"
said {h}.|] [After that nobody laughed at small things any more.|From that day on, {h} had a place among the great
ones, right in the middle.|And to this day, when the night is dark, somebody says, "Do not worry. {h} is there."|It is
not how big you are that counts, but whether you come when you are called.]
"""

USEFUL_CASES = """
kind: tugboat
name: [Toot|Dabble|Pepper|Barnacle]
pro: she
f: the old lighthouse
life: She lived in a big grey harbour, had a red chimney and a very high whistle, and pulled barges full of potatoes
  from one side to the other.
big: the great ships
mock: We have crossed the ocean, and you have crossed the harbour!
crisis: a fog came down, so thick that you could not see your own nose. The biggest ship of all was coming home, with
  three hundred people on board, and it ran onto a sandbank.
bigfail: The other great ships wanted to help, but they were too deep for the shallow water.
deed1: With her flat little belly she slid over the sand, closer and closer, and threw a rope.
deed2: She pulled until her chimney glowed. Nothing moved. She pulled again, and then, inch by inch, the great ship
  came free.
thanks: The captain hung a silver bell on the tugboat's mast.

kind: lantern
name: [Glim|Spark|Wick|Ember]
pro: it
f: the old broom
life: It hung on a nail behind the stable door, and it had one cracked pane and a short little wick.
big: the street lamps
mock: We light up a whole street, and you can hardly light up a boot!
crisis: a storm put out every lamp in town. And just then a little girl named Nell had not come home from the woods.
bigfail: The street lamps stood on their posts, cold and dark, and they could not take one step.
deed1: A farmer lit the wick and carried the lantern out into the rain, over fields and through brambles. The wind
  blew and blew, but the cracked pane held.
deed2: Deep in the wood, Nell saw a tiny golden dot between the trees, and she ran towards it until she was safe in
  her father's arms.
thanks: Nell polished the lantern until it gleamed, and gave it a place in her own window.

season: winter
kind: train engine
name: [Puffin|Chuff|Steamy|Little Nine]
pro: he
f: the station clock
life: He ran on a narrow track between two villages, and he carried milk in the morning and schoolchildren at eight.
big: the express trains
mock: We need one minute for what takes you an hour!
crisis: the snow fell so high that the mountain village was cut off, and there was no bread left in it.
bigfail: The express trains were too wide for the old tunnel and too heavy for the wooden bridge.
deed1: He took three wagons full of bread and went up the mountain, puff by puff, through the narrow tunnel and over
  the bridge that creaked.
deed2: At the last bend he had almost no steam left. "One more turn," he said, and one more, and one more, and then he
  saw the lights of the village.
thanks: The children of the village painted a yellow star on his front.

season: winter
kind: bell
name: [Ting|Tinkle|Ding|Silver]
pro: she
f: the tower clock
life: She hung in the very top of a tower, above six large bells of bronze, and she was no larger than a teacup.
big: the large bells
mock: We can be heard in the next valley, and you cannot be heard in the next room!
crisis: a fire broke out in the baker's shop while everyone was asleep.
bigfail: The large bells wanted to ring, but their ropes were frozen stiff, and nobody could move them.
deed1: The little bell needed no rope, only a breath of wind. She swung, and swung harder, and rang as she had never
  rung before.
deed2: Her voice was so high and thin that it went through every keyhole. One window opened, and then ten, and soon
  there was a long row of people with buckets, and the fire was out.
thanks: The baker brought her a ribbon and a bun, though she could only use the ribbon.

kind: umbrella
name: [Flip|Drizzle|Mushroom|Plip]
pro: he
f: the old hat stand
life: He was yellow, he was made for a child, and he stood in the hall of a big house beside a row of tall black
  umbrellas.
big: the black umbrellas
mock: You could not keep a cat dry!
crisis: the wind howled round the house, and from under the hedge came a thin, wet cry.
bigfail: The black umbrellas were carried out, one by one, but the wind turned them inside out, and they were too wide
  to go under the hedge.
deed1: Then a boy took the little yellow umbrella and crept under the hedge with him. The wind pulled, but there was
  not much to pull at.
deed2: There in the mud lay four newborn kittens. The boy held the umbrella over them all night, until the rain
  stopped and the mother cat came.
thanks: One of the kittens stayed in the house, and it always slept beside the yellow umbrella.

kind: key
name: [Click|Rusty|Twist|Tiny]
pro: it
f: the old doormat
life: It hung on a large ring among many long iron keys, and nobody knew any more which lock it belonged to.
big: the iron keys
mock: We open gates and cellars, and you open nothing!
crisis: the rain would not stop, and the water in the mill rose higher and higher. Only the little door of the old
  sluice could let it out, and it was locked.
bigfail: The miller tried the iron keys one after another, but all of them were too thick.
deed1: With a shaking hand the miller took the last one, the little key. It slid into the lock, scratching through
  years of rust.
deed2: It turned a tiny bit. It stuck. It turned again, and click, the door sprang open and the water rushed out, away
  from the houses.
thanks: The miller hung the key on a hook of its own, with a blue ribbon.
"""
