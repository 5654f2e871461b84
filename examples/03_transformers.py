"""Fine-tune a transformers mixture of experts with coterie's experts inside, then take it into coterie and back.

python examples/03_transformers.py
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import coterie
from coterie.interop import from_hf, register_hf, to_hf

register_hf()
small = {"vocab_size": 256, "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_hidden_layers": 2}
config = Qwen3MoeConfig(**small, num_attention_heads=4, num_key_value_heads=2)
# Yours: AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", experts_implementation="coterie")
model = AutoModelForCausalLM.from_config(config, experts_implementation="coterie")

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
ids = torch.tensor(list(Path(__file__).read_bytes()))[:1024].view(8, 128)  # this file, as bytes
for step in range(31):
    loss = model(ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step:2}  loss {loss.item():.3f}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    ours = from_hf(folder)  # coterie's Transformer, the same weights: faster, and in coterie's cost tables and trainer
    to_hf(ours, folder)  # and back, equal bit for bit
prompt = ids[:1, :32]
print(
    "same tokens:",
    torch.equal(coterie.generate(ours, prompt, 16), model.generate(prompt, max_new_tokens=16, do_sample=False)),
)
