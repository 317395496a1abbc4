"""The words of the recall families, in two versions: one for tables of results, one for the selection of layouts.

A layout that was selected on the texts of a table would be measured in-sample by that table. So selections read other
filler, other phrases, other names, other text around a needle and other random tokens than the tables do. `{name}`,
`{value}` and `{count}` in a phrase are filled in.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """One version of the words.

    filler: whole sentences, which are repeated. `_ask`: a question, which the answer follows. hay: the shipped text that
    needles lie in. turn: which of every two word tokens random sequences are drawn from.
    """

    filler: str
    passkey_opening: str
    passkey_fact: str
    passkey_ask: str
    needle_fact: str
    needle_ask: str
    needle_names: str
    hay: str
    pairs_heading: str
    pairs_line: str
    pairs_ask: str
    book_heading: str
    book_line: str
    book_ask: str
    first_names: str
    last_names: str
    variable_first: str
    variable_next: str
    variable_ask: str
    turn: int


JUDGING = Wording(
    filler="The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ",
    passkey_opening="There is an important number hidden in this text. Find it and remember it. ",
    passkey_fact="The pass key is {value}. Remember it. {value} is the pass key. ",
    passkey_ask="What is the pass key? The pass key is ",
    needle_fact=" The special magic number for {name} is {value}.",
    needle_ask="\nWhat is the special magic number for {name}? The special magic number for {name} is ",
    needle_names=(
        "Berlin Cairo Delhi Geneva Havana Lima London Madrid Milan Moscow Oslo Paris Prague Quito Rome Seoul Sydney Tokyo"
    ),
    hay="heldout.jsonl.xz",
    pairs_heading="JSON data:\n{{\n",
    pairs_line=' "{name}": "{value}",\n',
    pairs_ask='}}\nThe value of "{name}" is:\n "{name}": "',
    book_heading="Phone book:\n",
    book_line="{name}: {value}\n",
    book_ask="\nWhat is the number of {name}?\n{name}: ",
    first_names=(
        "Ada Alma Anton Bela Boris Clara Cora Dora Edgar Elena Felix Flora Greta Hugo Ida Igor Iris Ivan Jonas Karl Laura"
    ),
    last_names=(
        "Abbot Bauer Carver Dalton Ekman Fisher Garner Holm Irving "
        "Jansen Keller Lindt Marlow Norris Olsen Parker Quinn Rossi"
    ),
    variable_first="VAR {name} = {value}. ",
    variable_next="VAR {name} = VAR {value}. ",
    variable_ask=(
        "\nFind all variables that are assigned the value {value} in the text above. {count} variables are assigned the "
        "value {value}, they are:"
    ),
    turn=0,
)

SELECTING = Wording(
    filler="Rain fell all night long. A dog slept near my door. Somebody left one lamp burning. Then it struck three. ",
    passkey_opening="Somebody put a secret code below. Keep that code in mind. ",
    passkey_fact="Our secret code reads {value}. Keep {value}, that secret code. ",
    passkey_ask="Which secret code was it? Our secret code reads ",
    needle_fact=" Visitors to {name} counted {value} steps.",
    needle_ask="\nHow many steps did visitors count? Visitors to {name} counted ",
    needle_names=(
        "Athens Boston Bergen Bilbao Dakar Dublin Geelong Hanoi Jakarta Lagos Leeds Leipzig Lisbon Manila Naples Perth Riga"
    ),
    hay="train.jsonl.xz",
    pairs_heading="Lockers and their codes\n",
    pairs_line="{name} -> {value}\n",
    pairs_ask="\nOne code again\n{name} -> ",
    book_heading="Who sits in which seat\n",
    book_line="{name}, seat {value}\n",
    book_ask="\nOne seat again\n{name}, seat ",
    first_names=(
        "Amos Asta Bruno Celia Dario Edith Emil Frida Gusta Hanna Ilse Jakob Klara Leon Marta Nils Olga Paula Rosa Simon"
    ),
    last_names=(
        "Adler Berg Conrad Drake Engel Falk Gruber Hansen Isaksen Jung Kramer Lange Moser Nagel Otto Pohl Reuter Sommer"
    ),
    variable_first="LET {name} BE {value}; ",
    variable_next="LET {name} BE {value}; ",
    variable_ask="\nList whatever was let be {value} by any of those steps; there were {count} such names:",
    turn=1,
)
