"""The demo's English sentences, written for this project.

``PAIRS`` are graded by hand from 0 (unrelated) to 5 (the same meaning), ten pairs a grade: enough for a sanity check of
a sentence encoder, not for a published number. ``SENTENCES`` are all of them plus texts of other lengths and subjects.
"""

from __future__ import annotations

__all__ = ["PAIRS", "SENTENCES"]

PAIRS: tuple[tuple[str, str, float], ...] = (
    # 5: the same thing said twice
    (
        "The bakery on the corner opens at six every morning.",
        "Each day the corner bakery opens its doors at 6 a.m.",
        5.0,
    ),
    ("She repaired the old radio by herself.", "She fixed the old radio without any help.", 5.0),
    ("The ferry was cancelled because of the storm.", "Because of the storm, the ferry did not run.", 5.0),
    ("My grandfather taught me how to play chess.", "I learned chess from my grandfather.", 5.0),
    ("Nobody was hurt when the scaffolding collapsed.", "The scaffolding fell down, but there were no injuries.", 5.0),
    ("Please turn off the lights before you leave.", "Switch off the lights before leaving, please.", 5.0),
    (
        "The committee postponed its decision until Thursday.",
        "The decision was put off by the committee until Thursday.",
        5.0,
    ),
    ("A small dog is sleeping under the kitchen table.", "Under the kitchen table, a little dog is asleep.", 5.0),
    ("It has not rained here for three weeks.", "For three weeks there has been no rain here.", 5.0),
    ("The museum lets children in for free.", "Children do not have to pay to enter the museum.", 5.0),
    # 4: equivalent but for details
    ("A woman is pouring tea into two cups.", "A woman is pouring tea into a cup.", 4.0),
    ("The train to the coast leaves at noon.", "The train to the coast leaves around midday on Sundays.", 4.0),
    ("He painted the garden fence dark green.", "He painted the fence green.", 4.0),
    ("Two boys are throwing snowballs in the park.", "Some boys are having a snowball fight outside.", 4.0),
    (
        "The engineers found a crack in the bridge's main cable.",
        "Engineers discovered damage to a cable of the bridge.",
        4.0,
    ),
    (
        "Our neighbour keeps bees and sells the honey.",
        "The man next door has beehives and sells honey at the market.",
        4.0,
    ),
    ("The recipe needs three eggs and a cup of flour.", "You need eggs and flour for this recipe.", 4.0),
    ("The concert hall was nearly full last night.", "Last night almost every seat of the hall was taken.", 4.0),
    (
        "Prices of vegetables rose sharply in spring.",
        "In spring, tomatoes and other vegetables became much more expensive.",
        4.0,
    ),
    ("The goalkeeper saved two penalties in the final.", "The goalkeeper stopped a penalty in the final match.", 4.0),
    # 3: roughly the same topic and event, with an important difference
    ("A man is chopping onions in the kitchen.", "A man is peeling potatoes in the kitchen.", 3.0),
    ("The library will close early on Friday.", "The library will be closed all day on Monday.", 3.0),
    ("She is learning to play the violin.", "She has played the violin in an orchestra for years.", 3.0),
    ("The company hired fifty people last year.", "The company dismissed fifty people last year.", 3.0),
    ("A child is building a castle of sand.", "A child is kicking down a sand castle.", 3.0),
    ("The doctor told him to drink more water.", "The doctor told him to drink less coffee.", 3.0),
    ("Snow fell on the mountain villages overnight.", "Heavy rain fell on the mountain villages yesterday.", 3.0),
    ("The cat jumped onto the roof of the car.", "The cat hid underneath the car.", 3.0),
    ("They moved to a bigger flat near the river.", "They bought a house near the river.", 3.0),
    ("The new phone has a better camera.", "The new phone's battery lasts longer.", 3.0),
    # 2: the same subject, not the same statement
    ("A farmer is driving a tractor across the field.", "A farmer is feeding the chickens.", 2.0),
    ("The film won three awards at the festival.", "The actor did not come to the festival.", 2.0),
    ("The river flooded the lower part of the town.", "People like to fish in the river below the town.", 2.0),
    ("He rides his bicycle to work in all weathers.", "His bicycle was stolen at the station.", 2.0),
    ("The students are writing an exam.", "The students are laughing on the stairs of the school.", 2.0),
    ("This soup is far too salty.", "My aunt makes soup on Saturdays.", 2.0),
    ("The telescope recorded a distant galaxy.", "The telescope was built by a small team over ten years.", 2.0),
    ("Her new novel is set in a harbour town.", "She signed copies of her novel for an hour.", 2.0),
    ("The plane landed twenty minutes late.", "The pilot greeted the passengers of the plane.", 2.0),
    ("Vaccines against the disease are widely available.", "The disease was first described a century ago.", 2.0),
    # 1: a word or a setting in common
    ("The chef sharpened his knives.", "The restaurant has a view of the harbour.", 1.0),
    ("A dog barked at the postman.", "Dogs have a keen sense of smell.", 1.0),
    ("The parliament voted on the new tax.", "The minister was born in a small village.", 1.0),
    ("She planted roses along the wall.", "The wall of the castle is two metres thick.", 1.0),
    ("The violinist broke a string.", "The opera house is being renovated.", 1.0),
    ("The match ended in a draw.", "The stadium's roof was paid for by a lottery.", 1.0),
    ("He forgot his umbrella on the bus.", "The bus company bought electric buses.", 1.0),
    ("The printer is out of paper.", "The office has large windows.", 1.0),
    ("Glaciers are melting faster than expected.", "Climbers need warm clothes on a glacier.", 1.0),
    ("The bank raised its interest rates.", "He waited an hour at the bank.", 1.0),
    # 0: unrelated
    ("The kettle is boiling.", "Our solar system has eight planets.", 0.0),
    ("A girl is braiding her sister's hair.", "The court rejected the appeal.", 0.0),
    ("Whales can hold their breath for over an hour.", "The password must have twelve characters.", 0.0),
    ("The tailor shortened the sleeves.", "Copper conducts electricity well.", 0.0),
    ("We missed the last bus home.", "Photosynthesis turns light into chemical energy.", 0.0),
    ("The choir rehearses on Tuesdays.", "The drill went through the concrete in seconds.", 0.0),
    ("An owl hooted in the forest.", "The accountant found an error in the invoices.", 0.0),
    ("He spread butter on his toast.", "The satellite lost contact with the ground station.", 0.0),
    ("The lecture on medieval trade was crowded.", "Put the wet shoes next to the stove.", 0.0),
    ("The goats climbed down the steep slope.", "Her passport expires in November.", 0.0),
)

_OTHERS: tuple[str, ...] = (
    # very short
    "Yes.",
    "Good morning!",
    "Too late.",
    "Fresh bread",
    "Where is the station?",
    "Call me back.",
    "Version 2.1 released",
    "It depends.",
    "Closed for repairs",
    "What a goal!",
    # questions
    "How do I reset the clock of my oven after a power cut?",
    "Which vaccines do I need before travelling to the tropics?",
    "Why does ice float on water?",
    "Can I return a book to another branch of the library?",
    "What is the difference between a violin and a viola?",
    "How many people live in the delta?",
    "Does this jacket come in a larger size?",
    "When did the first trains cross the mountains?",
    "Is it safe to eat the skin of a kiwi?",
    "How long should rice be left to soak?",
    # science and technology
    "Integer arithmetic needs less energy than floating-point arithmetic of the same width.",
    "The enzyme loses its shape, and with it its function, above sixty degrees.",
    "A capacitor blocks direct current and lets alternating current pass.",
    "The probe will need seven years to reach the outer planets.",
    "Rounding errors of independent sources add up like the steps of a random walk.",
    "Under the microscope the crystals look like tiny needles.",
    "The compiler moved the multiplication out of the inner loop.",
    "Tides are caused by the pull of the moon and, to a lesser degree, of the sun.",
    "A hash table finds an entry in constant time on average.",
    "The patient's blood pressure fell to normal values within a week.",
    "Lichens are partnerships of a fungus and an alga.",
    "Memory bandwidth, not arithmetic, limits the speed of a single long product of a matrix and a vector.",
    # news-like
    "The city council approved the plan for a second tram line on Wednesday evening.",
    "Farmers in the valley expect the smallest harvest of plums in twenty years.",
    "The central bank left its key rate unchanged, as most observers had expected.",
    "Rescuers brought eleven hikers down from the ridge after a night in the snow.",
    "The shipping company ordered four vessels that run on methanol.",
    "Striking bus drivers and the city will meet again on Monday.",
    "After a recount, the mayor was re-elected with a majority of nineteen votes.",
    "Archaeologists uncovered a Roman bath beneath the car park of the hospital.",
    "The national team lost its opening match by two goals to one.",
    "A power failure stopped trains in the north of the country for three hours.",
    # everyday life
    "I put the keys in the blue bowl next to the door, as always.",
    "The twins refuse to wear anything but yellow.",
    "Our landlord promised to repair the heating before the winter, but nothing has happened so far.",
    "She eats an apple and a handful of nuts at four o'clock.",
    "The queue at the post office reached the street.",
    "They argued about the map and took the wrong path twice.",
    "My sister's cat opens doors by hanging from the handle.",
    "The washing machine makes a strange noise when it spins.",
    "On Sundays the whole street smells of roast chicken.",
    "He waters the tomatoes before the sun gets too strong.",
    "The baby laughed every time the curtain moved.",
    "We danced in the kitchen while the pasta boiled over.",
    # instructions and product texts
    "Preheat the oven to 180 degrees and grease a round tin of 24 centimetres.",
    "Tighten the four screws crosswise, then remove the protective film.",
    "Do not use this ladder on wet or uneven ground.",
    "This lightweight rucksack has a padded back, two side pockets and a rain cover.",
    "Wash at thirty degrees with similar colours; do not tumble dry.",
    "Enter the six-digit code that we have just sent to your telephone.",
    "Back up your files before you install the update.",
    "The lamp switches itself off after four hours.",
    "Shake well before use and store in a cool, dark place.",
    "Press and hold both buttons for five seconds until the display flashes.",
    # reviews and opinions
    "The room was clean and quiet, but breakfast was a disappointment.",
    "Best noodles in town, and the owner remembers every guest.",
    "I wanted to like this book; its hero made that impossible.",
    "The second half of the film drags, though the ending is worth the wait.",
    "Sturdy, cheap and easy to assemble: I bought three.",
    "The support team answered within minutes and solved the problem.",
    "Never again: the seats were narrow, the flight was late and the bag is still missing.",
    "For the price, these headphones are surprisingly good.",
    # longer
    (
        "When the lighthouse was automated, the keeper and his wife moved to a cottage from which they could still "
        "see its beam, and for years they set their clocks by it."
    ),
    (
        "The treaty obliges every country that signed it to report its emissions once a year, to explain any "
        "increase, and to let independent experts examine the figures."
    ),
    (
        "Before the bridge was built, everything that the island needed, from flour to furniture, came on a boat that "
        "sailed twice a week if the weather allowed it."
    ),
    (
        "Although the two languages share most of their vocabulary, their grammars differ so much that speakers of "
        "one need months to follow a conversation in the other."
    ),
    (
        "The orchestra played the slow movement so quietly that one could hear the rain on the roof, and nobody in "
        "the audience dared to cough."
    ),
    (
        "In the first experiment the mice found the shorter way after three days; in the second, where the walls were "
        "painted in one colour, most of them needed more than a week."
    ),
    (
        "Our warehouse ships orders that arrive before two o'clock on the same day, later ones on the next working "
        "day, and heavy goods on Tuesdays and Fridays."
    ),
    (
        "The old cinema, which had shown films since the days when a pianist sat below the screen, was turned into a "
        "climbing hall, and its red seats now stand in half the living rooms of the quarter."
    ),
)

SENTENCES: tuple[str, ...] = tuple(s for first, second, _ in PAIRS for s in (first, second)) + _OTHERS
