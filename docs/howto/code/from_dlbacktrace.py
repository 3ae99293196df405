"""DLBacktrace's calls on the bundled model: several prompts, a draw, a temperature, and a picture."""

import moejax
from moejax import Backtrace
from moejax.dlbacktrace import DLBAutoSampler

if __name__ == "__main__":
    bt = Backtrace(model=moejax.load("tiny-olmoe"), model_type="olmoe", device="cpu")

    # several prompts at once; each is explained as it would be alone
    results = bt.run_task(
        task="generation",
        inputs=["And the LORD said unto", "In the beginning"],
        max_new_tokens=3,
        return_relevance=True,
        dlb_tokens_count=2,  # explain the first two of the new tokens
    )
    for step in results["relevance_trace"]:
        by_token = step["all_wt"]["decoder_embeddings"].sum(-1)  # [prompts, tokens]
        print(f"step {step['step_index']}: tokens {step['token_id']}, relevance of each prompt {by_token.sum(-1)}")
    for name, experts in bt.all_layer_expert_relevance.items():
        print(name, experts.shape)  # [prompts, tokens, experts]

    ids = results["generated_ids"][:1]
    sampler = DLBAutoSampler(dlb=bt)
    drawn = sampler.generate(input_ids=ids, max_new_tokens=3, temperature=0.8, top_p=0.9, seed=0)
    print("drawn:", drawn[0, ids.shape[1] :])

    for temperature in (0.5, 1.0, 2.0):
        logits = bt.predict(ids, temperature=temperature)["output"]["output_values"]
        print(f"largest logit at temperature {temperature}: {logits[0, -1].max():.3f}")
    relevance = bt.evaluation()  # of the last pass
    assert abs(relevance["decoder_embeddings"].sum() - 100) < 1e-2

    figure = bt.visualize_tokenwise_relevance_map(results["relevance_trace"], results["generated_ids"][:, :-3], row=0)
    print("a figure of", len(figure.axes[0].get_yticks()), "tokens")
