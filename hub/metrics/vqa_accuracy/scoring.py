"""VQA accuracy with the official normalisation (VQAv2; the same rule serves TextVQA and VizWiz)."""

import re
from collections.abc import Sequence


NORMALIZATIONS = ("vqav2", "textvqa", "vizwiz")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_BETWEEN_DIGITS = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")
# the official code hands a flag in where the number of replacements belongs: no more than this many periods go
_MOST_PERIODS = 32
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_ARTICLES = {"a", "an", "the"}

# The official list maps each contraction with one apostrophe missing to the contraction.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, letter in enumerate(word) if letter == "'"
}
# the one entry that goes the other way
_CONTRACTIONS["somebody'd"] = "somebodyd"


def _strip_punctuation(text: str) -> str:
    joined = _COMMA_BETWEEN_DIGITS.search(text) is not None
    stripped = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if joined or beside_space else " ")
    return _PERIOD.sub("", stripped, count=_MOST_PERIODS)


def _plain_words(text: str) -> str:
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalize_answer(text: str, normalization: str = "vqav2") -> str:
    """
    An answer as VQA accuracy compares it: lower case, no articles, digits for number words, contractions with their
    apostrophe, punctuation taken out by the official rules.

    Args:
        text: the answer.
        normalization: `"vqav2"`: the VQA challenge's; `"textvqa"` and `"vizwiz"`: that of EvalAI's answer processor,
            which takes out commas and question marks first and splits off a final 's.

    Raises:
        ValueError: unknown normalisation.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization is {normalization!r}; it must be one of {', '.join(NORMALIZATIONS)}.")
    if normalization != "vqav2":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _plain_words(_strip_punctuation(text))


def answer_accuracy(prediction: str, answers: str | Sequence[str], normalization: str = "vqav2") -> float:
    """
    Accuracy of one prediction, 0..1: the mean over leaving out each human answer of min(1, agreements / 3).

    Args:
        prediction: the model's answer.
        answers: those of people, ten of them; a string counts as the answer of all; without any the accuracy is 0.
        normalization: see [`normalize_answer`].
    """
    if isinstance(answers, str):
        return float(normalize_answer(prediction, normalization) == normalize_answer(answers, normalization))
    given = normalize_answer(prediction, normalization)
    same = [normalize_answer(answer, normalization) == given for answer in answers]
    if not same:
        return 0.0
    agreements = sum(same)
    return sum(min(1.0, (agreements - own) / 3) for own in same) / len(same)


def vqa_accuracy(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], normalization: str = "vqav2"
) -> dict[str, float]:
    """
    Mean VQA accuracy, 0..1.

    Args:
        predictions: answers.
        references: for each the human answers.
        normalization: see [`normalize_answer`].

    Raises:
        ValueError: no predictions, or not as many references.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: as many are needed.")
    scores = [answer_accuracy(*pair, normalization) for pair in zip(predictions, references, strict=True)]
    return {"accuracy": sum(scores) / len(scores)}
