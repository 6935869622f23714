"""Writes a GGUF file again with its matrices as floats. Needs numpy and gguf.

usage: python3 gguf_floats.py f16|f32 FROM TO
"""

import sys

try:
    import gguf
    import numpy as np
except ImportError as missing:
    sys.exit(f"error: {missing}; pip install numpy gguf==0.19.0, or name a Python that has them")

if len(sys.argv) != 4 or sys.argv[1] not in ("f16", "f32"):
    sys.exit(__doc__)
kind, source, target = sys.argv[1:]
matrix = {"f16": np.float16, "f32": np.float32}[kind]
file_type = {"f16": gguf.LlamaFileType.MOSTLY_F16, "f32": gguf.LlamaFileType.ALL_F32}[kind]
reader = gguf.GGUFReader(source)
architecture = reader.fields["general.architecture"].contents()
writer = gguf.GGUFWriter(target, architecture)
for name, field in reader.fields.items():
    if name.startswith("GGUF.") or name == "general.architecture":
        continue
    if name == "general.file_type":
        writer.add_file_type(file_type)
        continue
    value = field.types[0]
    inner = field.types[-1] if value == gguf.GGUFValueType.ARRAY else None
    writer.add_key_value(name, field.contents(), value, inner)
for tensor in reader.tensors:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    writer.add_tensor(tensor.name, values.astype(matrix if values.ndim == 2 else np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
