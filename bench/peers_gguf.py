"""A GGUF file's weights in 16 bits, for bench/peers.py: the same model without its quantization."""

from __future__ import annotations

from pathlib import Path

import gguf
from gguf.quants import dequantize, quantize

# Of the file, and of each tensor.
FILE_TYPES = {
    "bf16": (gguf.LlamaFileType.MOSTLY_BF16, gguf.GGMLQuantizationType.BF16),
    "f16": (gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16),
}
_KEPT = (gguf.GGMLQuantizationType.F32,)  # norms, which every program keeps so
_FILE_TYPE = "general.file_type"


def write_dequantized(source: Path, target: Path, name: str) -> None:
    """Write `source` to `target` with all tensors but float32 ones in a type of `FILE_TYPES`, and the
    metadata as it is."""
    file_type, wanted = FILE_TYPES[name]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", _FILE_TYPE):
            continue  # the writer's own
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
