"""Export of a trained model for other programs, with torch.export or as ONNX, including the normalisation."""

import importlib.util
import io
import json

import torch
from torch import nn

from harness.endings import UserError
from harness.files import atomic_write

TOLERANCE = 1e-3  # For the logits; other programs may sum in another order.


class Exported(nn.Module):
    """uint8 [N, 3, size, size], RGB -> logits float32 [N, classes]: `model` with its normalisation.

    mean, std: float32 [3] of the channels in [0, 1].
    """

    def __init__(self, model, mean, std):
        super().__init__()
        self.model = model
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.from_numpy(value)[:, None, None])

    def forward(self, pictures):
        return self.model((pictures.float() / 255 - self.mean) / self.std)


def export(model, known, path, warning=None):
    """Write `model` to `path`, .pt2 or .onnx, and return a line that says what was written and how it was checked.

    known: the evaluate.Known of the model. warning: a text to keep in the file. UserError if `path` exists, if the
    exported outputs differ, or if a package is missing.
    """
    write = {".pt2": _to_torch, ".onnx": _to_onnx}.get(path.suffix)
    if write is None:
        raise UserError(f"--export {path}: the name must end with .pt2 (torch.export) or .onnx")
    if path.exists():
        raise UserError(f"--export {path} already exists; choose another name or remove it")
    module = Exported(model.eval(), known.mean, known.std).eval()
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (3, 3, known.size, known.size), dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        expected = module(pictures)
    program = torch.export.export(module, (pictures[:2],), dynamic_shapes=({0: torch.export.Dim("pictures")},))
    notes = {"classes": json.dumps(known.classes)} | ({"warning": json.dumps(warning)} if warning else {})
    content, outputs = write(program, notes, pictures)
    form = f"written: {path} (uint8 [N, 3, {known.size}, {known.size}] -> logits [N, {len(known.classes)}])"
    if outputs is None:
        checked = "not checked, since onnxruntime is not installed"
    else:
        largest = float((outputs - expected).abs().max())
        if not largest <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise UserError(
                f"--export {path}: its outputs differ from the model's by {largest:.1e}; nothing was written"
            )
        checked = f"its outputs differ from the model's by at most {largest:.1e}"
    with atomic_write(path) as file:
        file.write(content)
    return f"{form}; {checked}"


def _to_torch(program, notes, pictures):
    """(the bytes of a .pt2 file that contains `notes`, {name: JSON}; its outputs for `pictures`)"""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={f"{name}.json": text for name, text in notes.items()})
    buffer.seek(0)
    with torch.inference_mode():
        return buffer.getvalue(), torch.export.load(buffer).module()(pictures)


def _to_onnx(program, notes, pictures):
    """(the bytes of an .onnx file that contains `notes`, {name: JSON}; its outputs for `pictures`, or None without
    onnxruntime)"""
    if not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise UserError("--export to ONNX needs two more packages: pip install onnx onnxscript")
    proto = torch.onnx.export(
        program, input_names=["pictures"], output_names=["logits"], dynamo=True, verbose=False
    ).model_proto
    for name, text in notes.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = name, text
    content = proto.SerializeToString()
    if not importlib.util.find_spec("onnxruntime"):
        return content, None
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, torch.from_numpy(session.run(None, {"pictures": pictures.numpy()})[0])
