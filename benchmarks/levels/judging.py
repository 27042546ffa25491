"""True captions told from untrue ones, within a form and across forms: what each way to judge a caption gets.

A caption of every form (full, partial, loose) and every worth (true, one fact wrong, of another scene) for each of 80
held-out scenes. Within a form nothing but the image tells them apart. AUC of true against untrue.
"""

import random

import torch
from torch import nn

from .arms import LEVELS, Arm, Rows
from .student import CAPTION, Student
from .worlds import FORMS, TRUTHS, Pairs, World, blind_caption


SCENES = 80
OTHERS = 7
"""Other images whose likelihood is taken off: with the image itself as many passes as there are levels."""
ALPHAS = (0.25, 0.5, 0.75, 1.0)


class Captions:
    """The captions that are judged, with the image features and the teacher's score of each.

    Args:
        world: whose scorer is the teacher.
        heldout: scenes that nothing was trained on; the first `SCENES` are taken.
        seed: of what the captions say.
    """

    def __init__(self, world: World, heldout: Pairs, seed: int):
        rng, rows = random.Random(f"judging/{seed}"), range(min(SCENES, len(heldout.scenes)))
        cells = [(row, form, truth) for row in rows for form in FORMS for truth in TRUTHS]
        self.texts = [blind_caption(heldout.scenes[row], rng, form, truth) for row, form, truth in cells]
        self.forms = [form for _, form, _ in cells]
        self.true = torch.tensor([truth == "true" for _, _, truth in cells])
        self.rows = torch.tensor([row for row, _, _ in cells])
        self.images = heldout.features[: len(rows)]
        self.features = self.images[self.rows]
        pooled = None if heldout.pooled is None else heldout.pooled[self.rows]
        self.teacher = world.score(self.features, pooled, self.texts)

    def aucs(self, values: torch.Tensor) -> dict[str, float]:
        """Mean AUC within the forms, and the AUC across them; ties count half."""
        within = []
        for form in FORMS:
            of_form = torch.tensor([each == form for each in self.forms])
            within.append(auc(values[of_form], self.true[of_form]))
        return {"within": round(sum(within) / len(within), 4), "across": round(auc(values, self.true), 4)}


def auc(values: torch.Tensor, true: torch.Tensor) -> float:
    """Chance that a true one has a higher value than an untrue one; ties count half."""
    higher = values[true].double()[:, None] - values[~true].double()[None]
    return float((higher > 0).double().mean() + 0.5 * (higher == 0).double().mean())


@torch.no_grad()
def log_likelihood(
    student: Student, arm: Arm, features: torch.Tensor, texts: list[str], level: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the log-probabilities of each text [rows], and its number of tokens [rows]."""
    sums, tokens = [], []
    for start in range(0, len(texts), 240):
        part = slice(start, start + 240)
        rows = Rows(features[part], texts[part], torch.full((len(texts[part]),), level))
        losses, mask, _ = student.answer_losses(arm, CAPTION, rows)
        sums.append(-losses.sum(1))
        tokens.append(mask.sum(1))
    return torch.cat(sums), torch.cat(tokens)


def judge_by_likelihood(student: Student, arm: Arm, captions: Captions) -> dict[str, torch.Tensor]:
    """Likelihood whole and a token, and the same less alpha times that of other images."""
    own, tokens = log_likelihood(student, arm, captions.features, captions.texts, LEVELS - 1)
    others = []
    for shift in range(1, OTHERS + 1):
        features = captions.images.roll(shift * 11, 0)[captions.rows]
        others.append(log_likelihood(student, arm, features, captions.texts, LEVELS - 1)[0])
    prior = torch.stack(others).logsumexp(0) - torch.tensor(float(OTHERS)).log()
    found = {"likelihood": own, "likelihood a token": own / tokens}
    for alpha in ALPHAS:
        found[f"likelihood less {alpha:g} of other images"] = own - alpha * prior
        found[f"likelihood a token less {alpha:g} of other images"] = (own - alpha * prior) / tokens
    return found


def judge_by_level(student: Student, arm: Arm, captions: Captions) -> torch.Tensor:
    """Mean level: each level's probability is the likelihood of the text behind it."""
    found = [log_likelihood(student, arm, captions.features, captions.texts, level)[0] for level in range(LEVELS)]
    return torch.stack(found, 1).softmax(1) @ torch.arange(float(LEVELS))


@torch.no_grad()
def last_states(student: Student, arm: Arm, features: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """State of the language model behind each text's end, [rows, hidden size]."""
    found = []
    for start in range(0, len(texts), 240):
        part = slice(start, start + 240)
        prefix, _ = student.prefix(arm, CAPTION, features[part], torch.full((len(texts[part]),), LEVELS - 1))
        answers = [student.ids(text + CAPTION.end) for text in texts[part]]
        longest = max(map(len, answers))
        ids = torch.stack([nn.functional.pad(row, (0, longest - len(row))) for row in answers])
        states = student.states(torch.cat([prefix, student.words(ids)], dim=1))
        ends = torch.tensor([prefix.shape[1] + len(row) - 1 for row in answers])
        found.append(states[torch.arange(len(ends)), ends])
    return torch.cat(found)


def judge_by_head(student: Student, arm: Arm, pairs: Pairs, captions: Captions) -> torch.Tensor:
    """The teacher's score, predicted by ridge regression on the last state; fitted on the training pairs."""
    seen = last_states(student, arm, pairs.features, pairs.captions).double()
    mean, scale = seen.mean(0), seen.std(0)
    seen = (seen - mean) / scale
    target = pairs.scores.double()
    weights = torch.linalg.solve(
        seen.T @ seen + 0.01 * len(seen) * torch.eye(seen.shape[1], dtype=torch.float64),
        seen.T @ (target - target.mean()),
    )
    return (last_states(student, arm, captions.features, captions.texts).double() - mean) / scale @ weights


def judge(student: Student, arm: Arm, pairs: Pairs, captions: Captions) -> dict[str, dict[str, float]]:
    """AUC of every way that the trained model offers, and of its teacher."""
    student.model.eval()
    values = judge_by_likelihood(student, arm, captions)
    values["score head"] = judge_by_head(student, arm, pairs, captions)
    values["teacher"] = captions.teacher
    if arm.cut is not None:
        values["mean level"] = judge_by_level(student, arm, captions)
    student.model.train()
    return {name: captions.aucs(value) for name, value in values.items()}
