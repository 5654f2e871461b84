"""Runs a GGUF file with llama.cpp and saves what it computes.

A script of its own: a file that llama.cpp cannot take may end the process, and the Python that has it need
not have torch.

python gguf_run.py MODEL.gguf PROMPTS.npy NEW_TOKENS RESULT.npz: of the prompts [R, L], each read on its own, the result
holds `logits` [R, L, vocab], and as `tokens` the NEW_TOKENS likeliest after the last, one by one.
"""

import sys


def main(model: str, prompts: str, new_tokens: str, result: str) -> None:
    import numpy as np
    from llama_cpp import Llama

    prompts, new_tokens = np.load(prompts), int(new_tokens)
    length = prompts.shape[1]
    # Keys and values in float32 (0 in ggml), so that what is compared is the weights.
    llama = Llama(model, n_ctx=length + new_tokens, logits_all=True, type_k=0, type_v=0, n_threads=1)
    logits, tokens = [], []
    for prompt in prompts:
        llama.reset()
        llama.eval(prompt.tolist())
        logits.append(llama.scores[:length].copy())
    for position in range(length, length + new_tokens):
        tokens.append(int(llama.scores[position - 1].argmax()))
        llama.eval(tokens[-1:])
    np.savez(result, logits=np.stack(logits), tokens=np.array(tokens))


if __name__ == "__main__":
    main(*sys.argv[1:])
