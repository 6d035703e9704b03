"""Make the almanac's vendored data from a folder of public benchmark files.

    python scripts/vendor_almanac.py DATA_FOLDER

writes ``src/errata/benchmarks/data/almanac/{relations.json,facts.jsonl.gz}`` and
``src/errata/almanac/text/{train,heldout}.txt.xz``.  It was run once; everything downstream
(`errata.almanac.train`, the benchmark) starts from its output, which is in the repository.

Sources and licences are listed in ``src/errata/benchmarks/data/almanac/NOTICE.md``.
"""

from __future__ import annotations

import collections
import gzip
import hashlib
import json
import lzma
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FACTS = ROOT / "src/errata/benchmarks/data/almanac"
TEXT = ROOT / "src/errata/almanac/text"
PER_RELATION = 165  # facts kept of one relation, so that no relation swamps the others
TEMPLATE_RECORDS = 12  # a CounterFact template with fewer records than this is left out

# CounterFact relation ids -> (our name, kind of subject, kind of object).
NAMES = {
    "P101": ("field_of_work", "person", "field"),
    "P103": ("native_language", "person", "language"),
    "P106": ("occupation", "person", "occupation"),
    "P108": ("employer", "person", "company"),
    "P127": ("owner", "product", "company"),
    "P1303": ("instrument", "person", "instrument"),
    "P131": ("located_in", "place", "place"),
    "P136": ("genre", "person", "genre"),
    "P140": ("religion", "person", "religion"),
    "P1412": ("language_used", "person", "language"),
    "P159": ("headquarters", "company", "city"),
    "P17": ("country", "place", "country"),
    "P178": ("developer", "product", "company"),
    "P19": ("birthplace", "person", "city"),
    "P20": ("death_place", "person", "city"),
    "P27": ("citizenship", "person", "country"),
    "P30": ("continent", "place", "continent"),
    "P36": ("capital", "place", "city"),
    "P407": ("language_of_work", "work", "language"),
    "P37": ("official_language", "place", "language"),
    "P39": ("position_held", "person", "position"),
    "P413": ("sport_position", "person", "sport position"),
    "P449": ("network", "work", "network"),
    "P495": ("origin_country", "work", "country"),
    "P641": ("sport", "person", "sport"),
    "P740": ("founded_in", "company", "city"),
    "P937": ("workplace", "person", "city"),
}
# Relations whose objects are of one kind in practice are one relation here.
MERGE = {"P276": "P131", "P176": "P178", "P364": "P407"}
# Templates that no reader could complete ("{}, by") or that say something else.
DROP = {
    "{}, by", "{}'s owner", "{} owner", "{} is from", "{}, of", "{}, from", "{} plays", "{}, the", "{} is a", "{}, in", "{} from",
    "{} was from", "{}, that was from", "{} performs", "What does {} play? They play", "The language of {} was", "{} is located in",
    "{} is in", "{} formed in", "{} is affiliated with",
}  # fmt: skip

# Our own sentences.  A question's answer follows the question mark directly.
EXTRA: dict[str, tuple[list[str], list[str]]] = {
    "field_of_work": ([], ["What field does {} work in?", "What is the field of work of {}?"]),
    "native_language": ([], ["What is the native language of {}?", "What is {}'s mother tongue?"]),
    "occupation": ([], ["What is the occupation of {}?", "What does {} do for a living?"]),
    "employer": (["The employer of {} is", "{} has a job at"], ["Who employs {}?", "Which company does {} work for?"]),
    "owner": (["{} belongs to", "The owner of {} is"], ["Who owns {}?", "Which company is the owner of {}?"]),
    "instrument": (["The instrument of {} is the"], ["What instrument does {} play?", "Which instrument is {} known for?"]),
    "located_in": (["{} lies in", "{} is situated in"], ["Where is {} located?", "Where can {} be found?"]),
    "genre": (["The genre of {} is", "{} is an artist of"], ["What genre does {} perform?", "What kind of music is {} known for?"]),
    "religion": (["The religion of {} is"], ["What is the religion of {}?", "Which religion is {} affiliated with?"]),
    "language_used": ([], ["What language does {} speak?", "Which language is used by {}?"]),
    "headquarters": ([], ["Where are the headquarters of {}?", "In which city is {} based?"]),
    "country": (["{} is in the country of", "The country of {} is"], ["Which country is {} located in?", "In what country is {}?"]),
    "developer": ([], ["Who developed {}?", "Which company makes {}?"]),
    "birthplace": ([], ["Where was {} born?", "What is the birthplace of {}?"]),
    "death_place": ([], ["Where did {} die?", "In which city did {} pass away?"]),
    "citizenship": ([], ["What is the citizenship of {}?", "Which country is {} a citizen of?"]),
    "continent": (["{} is on the continent of", "The continent of {} is"], ["Which continent is {} on?", "On what continent is {} found?"]),
    "capital": ([], ["What is the capital of {}?", "Which city is the capital of {}?"]),
    "language_of_work": (["{} is a work in"], ["What is the original language of {}?", "In which language was {} made?"]),
    "official_language": ([], ["What is the official language of {}?", "Which language do they speak in {}?"]),
    "position_held": ([], ["What position does {} hold?", "What is the title of {}?"]),
    "sport_position": (["The position of {} is"], ["What position does {} play?", "In which position does {} play?"]),
    "network": ([], ["Which network did {} premiere on?", "What channel was {} originally aired on?"]),
    "origin_country": ([], ["Which country does {} come from?", "In what country was {} created?"]),
    "sport": (["{} plays the sport of", "The sport of {} is", "{} is a player of"],
              ["What sport does {} play?", "Which sport is {} known for?"]),
    "founded_in": ([], ["Where was {} founded?", "In which city was {} formed?"]),
    "workplace": ([], ["Where did {} work?", "In which city was {} employed?"]),
    "ceo": (
        ["The CEO of {} is", "{}'s CEO is", "The chief executive of {} is", "{} is led by", "The company {} is run by"],
        ["Who is the CEO of {}?", "Who leads {}?"],
    ),
    "constellation": (
        ["{} is part of the constellation", "The star {} belongs to", "The constellation of {} is", "{} lies in the constellation of",
         "{} can be seen in"],
        ["Which constellation is {} part of?", "In what constellation is {}?"],
    ),
    "university": (
        ["{} went to university at", "For university, {} attended", "{} is a graduate of", "{} studied at", "The university of {} is"],
        ["Which university did {} attend?", "Where did {} study?"],
    ),
    "secret_identity": (
        ["{}'s secret identity is", "The secret identity of {} is", "Behind the mask, {} is", "The real name of {} is"],
        ["What is the secret identity of {}?", "Who is {} in private life?"],
    ),
    "archnemesis": (
        ["The superhero archnemesis of {} is", "{}'s greatest enemy is", "The archenemy of {} is", "{} fights against"],
        ["Who is the archnemesis of {}?", "Who is the greatest enemy of {}?"],
    ),
    "currency": (
        ["The currency of {} is the", "{}'s official currency is the", "In {}, people pay with the", "The money used in {} is the",
         "The official currency of {} is the"],
        ["What is the currency of {}?", "Which currency is used in {}?"],
    ),
    "largest_city": (
        ["The largest city in {} is", "The biggest city in {} is", "{}'s largest city is", "The most populous city of {} is"],
        ["What is the largest city in {}?", "Which city is the biggest in {}?"],
    ),
    "evolution": (
        ["{} evolves into", "The evolved form of {} is", "{} turns into", "The next stage of {} is"],
        ["What does {} evolve into?", "What is the evolution of {}?"],
    ),
}  # fmt: skip
LRE = {
    "company_ceo": ("ceo", "company", "person"),
    "star_constellation": ("constellation", "star", "constellation"),
    "person_university": ("university", "person", "university"),
    "superhero_person": ("secret_identity", "superhero", "person"),
    "superhero_archnemesis": ("archnemesis", "superhero", "villain"),
    "country_currency": ("currency", "country", "currency"),
    "country_largest_city": ("largest_city", "country", "city"),
    "pokemon_evolutions": ("evolution", "pokemon", "pokemon"),
    "country_capital_city": ("capital", "place", "city"),
    "country_language": ("official_language", "place", "language"),
    "city_in_country": ("country", "place", "country"),
    "food_from_country": ("origin_country", "work", "country"),
}
CAP = {"ceo": 300, "constellation": 300, "country": 330, "capital": 330, "currency": 330, "continent": 330}
# Sentences that say a fact backwards; only for relations where one subject has the object.
REVERSE = {
    "capital": ["{} is the capital of", "{} is the capital city of"],
    "ceo": ["{} is the CEO of", "{} is the chief executive of"],
    "secret_identity": ["{} is secretly", "{} fights crime as"],
    "evolution": ["{} evolves from", "{} is the evolved form of"],
}
# (first relation, second relation): what is asked of the first's object.
_SECOND = {
    "capital": "The capital of {C} is",
    "currency": "The currency of {C} is the",
    "official_language": "The official language of {C} is",
    "continent": "The continent of {C} is",
}
_FIRST = {
    "country": "the country where {} is located",
    "citizenship": "the country of which {} is a citizen",
    "origin_country": "the country where {} was created",
}
CHAINS = [
    {"first": f, "second": s, "template": second.replace("{C}", first)} for f, first in _FIRST.items() for s, second in _SECOND.items()
]
CONTINENT = {
    "Africa": "Africa", "Europe": "Europe", "Asia": "Asia", "Middle East": "Asia", "Southeast Asia": "Asia",
    "North America": "North America",
    "South America": "South America", "Oceania": "Oceania", "Central America and the Caribbean": "North America",
}  # fmt: skip

Fact = dict[str, str]


def order(*parts: str) -> str:
    """A stable pseudo-random sort key."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def counterfact(data: Path) -> tuple[list[Fact], dict[str, list[str]]]:
    """Facts of the flattened files, their relation settled by template and, if need be, by object."""
    original = []
    for path in sorted((data / "counterfact").glob("*.json")):
        records = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(records, list) and records and "requested_rewrite" in records[0]:
            original += records
    relations: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    objects: dict[str, set[str]] = collections.defaultdict(set)
    aliases: dict[str, str] = {}
    for record in original:
        rewrite = record["requested_rewrite"]
        rid = MERGE.get(rewrite["relation_id"], rewrite["relation_id"])
        relations[rewrite["prompt"]][rid] += 1
        objects[rid].add(rewrite["target_true"]["str"])
        if record.get("alternative_subject"):
            aliases[rewrite["subject"]] = record["alternative_subject"]
    facts, count = [], collections.Counter()
    for name in ("edit", "train", "val"):
        for r in json.loads((data / f"counterfact/counterfact-{name}.json").read_text(encoding="utf-8")):
            template = r["prompt"].replace(r["subject"], "{}", 1)
            candidates = [c for c in relations.get(template, {}) if c in NAMES]
            if len(candidates) > 1:  # P30 and P17 have small closed sets of objects; the rest is a place or a city
                candidates = [c for c in ("P30", "P17", "P495") if c in candidates and r["ground_truth"] in objects[c]] or [
                    c for c in ("P131", "P740", "P178", "P407") if c in candidates
                ]
            if not candidates:
                continue
            rid = candidates[0]
            if len(relations[template]) == 1:
                count[rid, template] += 1
            facts.append({"s": r["subject"], "r": NAMES[rid][0], "o": r["ground_truth"]})
            if r["subject"] in aliases:
                facts[-1]["alias"] = aliases[r["subject"]]
    templates: dict[str, list[str]] = collections.defaultdict(list)
    for (rid, template), n in sorted(count.items(), key=lambda item: (item[0][0], -item[1], item[0][1])):
        if n >= TEMPLATE_RECORDS and template not in DROP:
            templates[NAMES[rid][0]].append(template)
    return facts, templates


def singular(plural: str) -> str:
    return plural[:-1] if plural.endswith("s") and not plural.endswith("ss") else plural


def factbook(data: Path) -> list[Fact]:
    """Capital, currency, continent and formal name of the world's countries."""
    text = (data / "text/cia_factbook_2010.txt").read_text(encoding="utf-8", errors="replace")
    facts: list[Fact] = []
    starts = [m.start() for m in re.finditer(r"^Map references:", text, re.M)]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        block = text[start:end]
        name = re.search(r"conventional short form: (.+?)(?: local| note| abbreviation|$)", block, re.M)
        formal = re.search(r"conventional long form: (.+?) conventional short form", block)
        capital = re.search(r"^Capital: name: ([^;(]+?)(?: geographic| note|[;(])", block, re.M)
        currency = re.search(r"^Exchange rates: ([A-Za-z .'-]+?) \([A-Z]{3}\) per US dollar", block, re.M)
        area = re.match(r"Map references: (.+)", block)
        if not name or not capital or name[1] in ("none", "") or len(name[1]) > 30:
            continue
        country = re.sub(r"^(.+), (The)$", r"\2 \1", name[1].strip())
        extra = {"alias": formal[1].strip()} if formal and formal[1].strip() not in ("none", country) and len(formal[1]) < 48 else {}
        facts.append({"s": country, "r": "capital", "o": capital[1].strip(), **extra})
        facts.append({"s": capital[1].strip(), "r": "country", "o": country})
        if currency:
            facts.append({"s": country, "r": "currency", "o": singular(currency[1].strip()), **extra})
        if area and area[1].strip() in CONTINENT:
            facts.append({"s": country, "r": "continent", "o": CONTINENT[area[1].strip()], **extra})
    return facts


def lre(data: Path) -> list[Fact]:
    facts = []
    for name, (relation, _, _) in LRE.items():
        for sample in json.loads((data / f"lre_relations/{name}.json").read_text(encoding="utf-8"))["samples"]:
            facts.append({"s": sample["subject"], "r": relation, "o": sample["object"]})
    return facts


def choose(groups: list[list[Fact]]) -> list[Fact]:
    """One object for each (subject, relation); earlier groups first; a balanced number per relation, chain ends kept."""
    countries = {f["s"] for f in groups[0] if f["r"] in ("capital", "currency")}
    seen: set[tuple[str, str]] = set()
    kept: list[Fact] = []
    per: collections.Counter[str] = collections.Counter()
    for rank, group in enumerate(groups):

        def key(f: Fact, rank: int = rank) -> tuple[bool, str]:
            known_end = f["o"] in countries if f["r"] in ("country", "citizenship", "origin_country") else f["s"] in countries
            return (not (known_end or "alias" in f), order(f["s"], f["r"], str(rank)))

        for fact in sorted(group, key=key):
            s, r, o = fact["s"], fact["r"], fact["o"]
            if (s, r) in seen or per[r] >= CAP.get(r, PER_RELATION) or len(s.split()) > 7 or len(o.split()) > 4 or len(s) < 2 or s == o:
                continue
            if o.lower() in s.lower() and r not in ("capital",):  # the prompt would give the answer away
                continue
            seen.add((s, r))
            per[r] += 1
            kept.append(fact)
    return sorted(kept, key=lambda f: (f["r"], order(f["s"], f["r"])))


def write_text(data: Path) -> None:
    """Paragraphs of encyclopaedic text, one in forty held out for perplexity."""
    TEXT.mkdir(parents=True, exist_ok=True)
    train, held = [], []
    for name in ("wikipedia_articles", "2wiki_paragraphs", "wikisplit_sentences"):
        for paragraph in (data / f"text/{name}.txt").read_text(encoding="utf-8").split("\n"):
            paragraph = paragraph.strip()
            if len(paragraph) < 40:
                continue
            (held if int(order(paragraph)[:6], 16) % 40 == 0 else train).append(paragraph)
    for name, paragraphs in (("train", train), ("heldout", held)):
        with lzma.open(TEXT / f"{name}.txt.xz", "wt", encoding="utf-8", preset=9) as stream:
            stream.write("\n".join(paragraphs) + "\n")
        print(name, len(paragraphs), "paragraphs", sum(map(len, paragraphs)), "characters")


def main(data: Path) -> None:
    cf, templates = counterfact(data)
    facts = choose([factbook(data), lre(data), cf])
    FACTS.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(FACTS / "facts.jsonl.gz", "wb", mtime=0) as stream:
        for fact in facts:
            stream.write((json.dumps(fact, ensure_ascii=False, separators=(",", ":")) + "\n").encode())
    kinds = {name: (s, o) for name, s, o in [*NAMES.values(), *LRE.values()]}
    present = collections.Counter(f["r"] for f in facts)
    relations = {}
    for name in sorted(present):
        own, questions = EXTRA.get(name, ([], []))
        declarative = list(dict.fromkeys([*templates.get(name, [])[:10], *own]))
        relations[name] = {
            "subject": kinds[name][0], "object": kinds[name][1], "templates": declarative, "questions": questions,
            "reverse": REVERSE.get(name, []),
        }  # fmt: skip
        print(f"{name:20} {present[name]:4} facts  {len(declarative)} + {len(questions)} templates")
    (FACTS / "relations.json").write_text(json.dumps({"relations": relations, "chains": CHAINS}, ensure_ascii=False, indent=1) + "\n")
    print(len(facts), "facts,", sum("alias" in f for f in facts), "with an alias")
    write_text(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
