"""A llama.cpp of Python: a converter for Llamas and a quantizer, by the names that llama.cpp has.

Both are programs that write real GGUF files with the package `gguf`, so that all of an export but
llama.cpp itself is run in seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path

CONVERTER = """
import argparse, json, sys
from pathlib import Path
import gguf, numpy as np
from safetensors.numpy import load_file

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--outfile")
parser.add_argument("--outtype", default="f16")
parser.add_argument("--vocab-only", action="store_true")
args = parser.parse_args()
fault = Path(__file__).with_name("fault")
fault = fault.read_text() if fault.exists() else ""
if fault == "unknown":
    sys.exit("ERROR: Model LlamaForCausalLM is not supported")
config = json.loads((args.model / "config.json").read_text())
heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
writer = gguf.GGUFWriter(args.outfile, "llama")
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_block_count(config["num_hidden_layers"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(heads)
writer.add_head_count_kv(groups)
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_vocab_size(config["vocab_size"])
writer.add_rope_dimension_count(config["hidden_size"] // heads)
writer.add_tokenizer_model("llama")
writer.add_token_list([str(i) for i in range(config["vocab_size"])])
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
plain = {"f16": np.float16, "f32": np.float32, "q8_0": np.float32}[args.outtype]
files = [] if args.vocab_only else args.model.glob("*.safetensors")
for name, tensor in (pair for file in files for pair in load_file(file).items()):
    for part, count in (("q_proj", heads), ("k_proj", groups)):
        if part in name:
            m, n = tensor.shape
            tensor = tensor.reshape(count, 2, m // count // 2, n).swapaxes(1, 2).reshape(m, n)
    name = names.get_name(name, try_suffixes=(".weight",))
    if tensor.ndim == 1:
        writer.add_tensor(name, tensor.astype(np.float32) + (fault == "norms"))
    elif args.outtype == "q8_0":
        kind = gguf.GGMLQuantizationType.Q8_0
        held = gguf.quantize(tensor.astype(np.float32), kind)
        writer.add_tensor(name, held, raw_dtype=kind)
    else:
        writer.add_tensor(name, np.ascontiguousarray(tensor.astype(plain)))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""

QUANTIZER = """#!{python}
import sys
import gguf, numpy as np

source, target, kind = sys.argv[1:]
kind, reader = gguf.GGMLQuantizationType[kind], gguf.GGUFReader(source)
writer = gguf.GGUFWriter(target, "llama")
for field in reader.fields.values():
    if not field.name.startswith("GGUF.") and field.name != "general.architecture":
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        sub = field.types[-1] if array else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
for tensor in reader.tensors:
    if len(tensor.shape) == 1:
        writer.add_tensor(tensor.name, tensor.data)
    else:
        held = gguf.quantize(tensor.data.astype(np.float32), kind)
        writer.add_tensor(tensor.name, held, raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


def make_llama_cpp(directory: Path, fault: str = "") -> Path:
    """A directory of llama.cpp's, converter and built quantizer.

    Args:
        directory: is made.
        fault: "unknown": the converter knows no model; "norms": it adds one to norms, as
            only Gemma's want.
    """
    programs = directory / "build" / "bin"
    programs.mkdir(parents=True)
    (directory / "convert_hf_to_gguf.py").write_text(CONVERTER, encoding="utf-8")
    (directory / "fault").write_text(fault, encoding="utf-8")
    quantizer = programs / "llama-quantize"
    quantizer.write_text(QUANTIZER.format(python=sys.executable), encoding="utf-8")
    quantizer.chmod(0o755)
    return directory
