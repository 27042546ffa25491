"""
The judge after stage 2, on the two models that come with the playground: texts as captions or as answers, short
answers, and the best of several descriptions; the last tables of benchmarks/judge.md.

    python benchmarks/judge_answers.py            # five minutes on one core
"""

import argparse
import random

import torch

from aligngpt_playground import measures
from aligngpt_playground.captions import DESCRIBE
from aligngpt_playground.evaluate import questions_of
from aligngpt_playground.scenes import Scene
from aligngpt_playground.trained import MODELS, trained_model
from aligngpt_playground.world import make_conversations, make_pairs


CAPTIONS, CONVERSATIONS, IMAGES, DRAWS, TOKENS = 480, 60, 128, (1, 4, 8), 40


def forms(model: measures.SavedModel) -> dict[str, float]:
    """AUC of true from untrue captions, as captions and as answers."""
    asked = {"as a caption": None, "as an answer": DESCRIBE}
    return {
        name: measures.judge_captions(model, question, CAPTIONS)["judge"]["true from untrue"]
        for name, question in asked.items()
    }


def short_answers(model: measures.SavedModel) -> dict[str, float]:
    """AUC of right from wrong answers to held-out questions; a wrong one is another question's of the same type."""
    rng = random.Random(0)
    rows = make_conversations(CONVERSATIONS, seed=77, split="heldout", turns=6)
    asked = [(row["images"][0], question) for row in rows for question in questions_of(row)]
    wrong = [
        rng.choice([q.answer for _, q in asked if q.type == one.type and q.answer != one.answer]) for _, one in asked
    ]
    figures = {}
    for form in ("as a caption", "as an answer"):
        good, bad = [], []
        for (image, question), other in zip(asked, wrong, strict=True):
            told = question.question if form == "as an answer" else None
            inputs = model.processor.judge_inputs([image] * 2, [question.answer, other], told)
            levels = model.model.judge(**inputs).mean_level.tolist()
            good.append(levels[0])
            bad.append(levels[1])
        figures[form] = measures.auc(good, bad)
    return figures


def best_of(model: measures.SavedModel, seed: int = 0) -> dict[str, dict[str, float]]:
    """Descriptions: greedy, drawn, and the best of several by the judge and by likelihood a token."""
    rows = make_pairs(IMAGES, seed=4242, split="heldout")
    images, scenes = [row["image"] for row in rows], [Scene.from_json(row["scene"]) for row in rows]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": DESCRIBE}]}]
        for image in images
    ]
    inputs = model.processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )

    def generate(**settings) -> list[str]:
        with torch.inference_mode():
            ids = model.model.generate(**inputs, max_new_tokens=TOKENS, **settings)
        texts = model.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() or "nothing" for text in texts]

    figures = {"greedy": measures.describe_captions(generate(do_sample=False), scenes)}
    torch.manual_seed(seed)
    number = max(DRAWS)
    drawn = generate(do_sample=True, temperature=1.0, num_return_sequences=number)
    texts = [drawn[start : start + number] for start in range(0, len(drawn), number)]
    scores: dict[str, list[list[float]]] = {"judge": [], "likelihood": []}
    for image, candidates in zip(images, texts, strict=True):
        verdict = model.model.judge(**model.processor.judge_inputs([image] * number, candidates))
        scores["judge"].append(verdict.mean_level.tolist())
        asked = model.model.judge(**model.processor.judge_inputs([image] * number, candidates, DESCRIBE))
        scores["likelihood"].append((asked.log_likelihoods[:, -1] / asked.num_tokens).tolist())
    for draws in DRAWS:
        for name, values in scores.items() if draws > 1 else [("", scores["judge"])]:
            chosen = [
                candidates[max(range(draws), key=value.__getitem__)]
                for candidates, value in zip(texts, values, strict=True)
            ]
            title = f"best of {draws} by {name}" if draws > 1 else "one draw"
            figures[title] = measures.describe_captions(chosen, scenes)
    return figures


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name in MODELS:
        model = measures.SavedModel(trained_model(name))
        print(f"\n{name}: {MODELS[name]}")
        for title, figures in (("true captions", forms(model)), ("right short answers", short_answers(model))):
            print(f"{title}: " + ", ".join(f"{form} {value:.3f}" for form, value in figures.items()), flush=True)
        print("| | all objects | absent object |\n|---|---|---|")
        for title, figures in best_of(model).items():
            print(f"| {title} | {figures['all objects']:.3f} | {figures['absent object']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
