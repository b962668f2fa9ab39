"""Convert a GGUF file to 16-bit weights, for bench/peers.py: the same model without quantization."""

from __future__ import annotations

from pathlib import Path

import gguf
from gguf.quants import dequantize, quantize

# (the type of the file, the type of each tensor)
FILE_TYPES = {
    "bf16": (gguf.LlamaFileType.MOSTLY_BF16, gguf.GGMLQuantizationType.BF16),
    "f16": (gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16),
}
_KEPT = (gguf.GGMLQuantizationType.F32,)  # norms, which every program keeps in float32
_FILE_TYPE = "general.file_type"


def write_dequantized(source: Path, target: Path, name: str) -> None:
    """Write `source` to `target` with the same metadata, and with all tensors except float32 ones in
    the type `name` of `FILE_TYPES`."""
    file_type, wanted = FILE_TYPES[name]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", _FILE_TYPE):
            continue  # the writer sets these itself
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        if tensor.tensor_type in _KEPT:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        data = quantize(dequantize(tensor.data, tensor.tensor_type), wanted)
        writer.add_tensor(tensor.name, data, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
