"""What a meta-step must compute, written again in plain PyTorch from the equations.

Shares no code with the package under test: its own tokenisation and masks, functional parameters instead of in-place
steps, ``torch.autograd.grad`` instead of ``.backward``, one example at a time, no packing, no sharding.
"""

from __future__ import annotations

import pandas as pd
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer


def anything(name):
    return True


def load_model(path, lora=None, **overrides):
    """The model in fp32 and eval-free train mode; ``lora``: keyword arguments of ``peft.LoraConfig`` or None."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", **overrides)
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", bias="none", **lora))
    return model.train()  # some models compute otherwise when they are evaluated (Gemma 3n)


def tokenize(tokenizer, messages):
    """(input_ids [tokens], response positions [tokens] bool): the assistant's words and the end token are learned."""
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(prompt)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    prompt_length = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    is_response = torch.arange(len(ids)) >= prompt_length
    return torch.tensor(ids), is_response


def response_loss(model, parameters, examples):
    """Mean negative log-likelihood over the response tokens of one batch of one task."""
    total, count = 0.0, 0
    for ids, is_response in examples:
        # Without a mask some models take every token that is the padding token for padding.
        inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "use_cache": False}
        logits = functional_call(model, parameters, args=(), kwargs=inputs).logits
        log_probs = torch.log_softmax(logits[0, :-1], dim=-1)
        picked = log_probs.gather(1, ids[1:, None]).squeeze(1)
        total = total - (picked * is_response[1:]).sum()
        count += int(is_response[1:].sum())
    return total / count


class Reference:
    """The update rules for one model, one tokenizer and the parquet files of a task folder."""

    def __init__(self, model_path, task_dir, lora=None):
        self.model = load_model(model_path, lora)
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.task_dir = task_dir
        self._frames = {}

    def theta(self):
        """name -> tensor of the trained parameters (a copy)."""
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}

    def examples(self, task, kind, indices):
        key = f"{task}_{kind}"
        if key not in self._frames:
            self._frames[key] = pd.read_parquet(f"{self.task_dir}/{key}.parquet")["messages"]
        return [tokenize(self.tokenizer, [dict(m) for m in self._frames[key].iloc[i]]) for i in indices]

    def gradient(self, theta, examples):
        leaves = {n: t.detach().clone().requires_grad_(True) for n, t in theta.items()}
        loss = response_loss(self.model, leaves, examples)
        # Experts that no token of the batch was routed to have no gradient.
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, gradients, strict=True)), loss.item()

    def adapt(
        self, theta, task, support_batches, lr, optimizer="sgd", clip=None, rates=None, taken=None, only=anything
    ):
        """theta_i after one inner step per batch.

        ``clip``: largest norm of a step's gradient; ``rates``: name -> a rate, or one for every step, in the place of
        ``lr``; ``taken``: a list that takes in u_k, name -> tensor, of every step; ``only``: whether the tensor of a
        name is adapted.
        """
        adapted = dict(theta)
        first = {n: torch.zeros_like(t) for n, t in theta.items()}
        second = {n: torch.zeros_like(t) for n, t in theta.items()}
        for k, indices in enumerate(support_batches, start=1):
            gradients, _ = self.gradient(adapted, self.examples(task, "support", indices))
            gradients = {n: g if only(n) else torch.zeros_like(g) for n, g in gradients.items()}
            norm = sum((g**2).sum() for g in gradients.values()) ** 0.5
            scale = 1.0 if clip is None else min(1.0, clip / float(norm))
            updates = {}
            for name, g in gradients.items():
                g = g * scale
                if optimizer == "sgd":
                    update = g
                else:  # Adam as in Kingma & Ba 2015, algorithm 1, no weight decay
                    first[name] = 0.9 * first[name] + 0.1 * g
                    second[name] = 0.999 * second[name] + 0.001 * g * g
                    update = (first[name] / (1 - 0.9**k)) / ((second[name] / (1 - 0.999**k)).sqrt() + 1e-8)
                rate = lr if rates is None else float(rates[name][k - 1 if len(rates[name]) > 1 else 0])
                adapted[name] = adapted[name] - rate * update
                updates[name] = update
            if taken is not None:
                taken.append(updates)
        return adapted

    def rate_gradient(self, theta, episodes, rates, optimizer="sgd", clip=None, only=anything):
        """Name -> derivatives of the mean query loss by the logarithms of ``rates``, to first order.

        Autograd's, through theta_i,K = theta - sum_k exp(a_k) u_k with constant u_k.
        """
        total = {n: torch.zeros_like(r) for n, r in rates.items()}
        for task, support_batches, query_batch in episodes:
            taken = []
            self.adapt(theta, task, support_batches, None, optimizer, clip, rates, taken, only)
            logarithms = {n: r.log().requires_grad_(True) for n, r in rates.items()}
            adapted = {}
            for name, start in theta.items():
                steps = logarithms[name].exp().expand(len(taken))
                adapted[name] = start - sum(rate * u[name] for rate, u in zip(steps, taken, strict=True))
            loss = response_loss(self.model, adapted, self.examples(task, "query", query_batch))
            gradients = torch.autograd.grad(loss, list(logarithms.values()), materialize_grads=True)
            for name, g in zip(logarithms, gradients, strict=True):
                total[name] += g / len(episodes)
        return total

    def first_order_gradient(
        self,
        theta,
        episodes,
        lr,
        optimizer="sgd",
        aggregation="mean",
        trajectory=0.0,
        clip=None,
        rates=None,
        only=anything,
        supports=anything,
    ):
        """FOMAML and META-LORA. ``episodes``: (task, support_batches, query_batch) triples; ``trajectory``: w, where
        ``supports`` says so of a name, or else 0."""
        total = {n: torch.zeros_like(t) for n, t in theta.items()}
        for task, support_batches, query_batch in episodes:
            for k in range(len(support_batches) if trajectory else 0):
                at_k = self.adapt(theta, task, support_batches[:k], lr, optimizer, clip, rates, None, only)
                gradients, _ = self.gradient(at_k, self.examples(task, "support", support_batches[k]))
                for name, g in gradients.items():
                    total[name] += (trajectory if supports(name) else 0.0) / len(support_batches) * g
            adapted = self.adapt(theta, task, support_batches, lr, optimizer, clip, rates, None, only)
            gradients, _ = self.gradient(adapted, self.examples(task, "query", query_batch))
            for name, g in gradients.items():
                total[name] += (1 - trajectory if supports(name) else 1.0) * g
        scale = 1 / len(episodes) if aggregation == "mean" else 1.0
        return {n: t * scale for n, t in total.items()}

    def exact_gradient(self, theta, episodes, lr, optimizer="sgd", steps=None, rates=None, only=anything):
        """MAML: the query loss after adaptation, differentiated through the last ``steps`` inner steps (None: all).

        Returns:
            Its gradients by theta and, where ``rates`` [S] by name take the place of ``lr``, by their logarithms.
        """
        total = {n: torch.zeros_like(t) for n, t in theta.items()}
        of_rates = None if rates is None else {n: torch.zeros_like(r) for n, r in rates.items()}
        for task, support_batches, query_batch in episodes:
            start = 0 if steps is None else len(support_batches) - steps
            at = {n: t.detach().clone().requires_grad_(True) for n, t in theta.items()}
            leaves, first, second = at, dict.fromkeys(theta, 0.0), dict.fromkeys(theta, 0.0)
            logarithms = None if rates is None else {n: r.log().requires_grad_(True) for n, r in rates.items()}
            for k, indices in enumerate(support_batches):
                if k == start:
                    at = leaves = {n: t.detach().clone().requires_grad_(True) for n, t in at.items()}
                    first = {n: m if isinstance(m, float) else m.detach() for n, m in first.items()}
                loss = response_loss(self.model, at, self.examples(task, "support", indices))
                gradients = torch.autograd.grad(loss, list(at.values()), create_graph=True, materialize_grads=True)
                for n, g in zip(list(at), gradients, strict=True):
                    update = g
                    if optimizer == "adamw":  # sqrt(v) + eps is held constant
                        first[n] = 0.9 * first[n] + 0.1 * g
                        second[n] = 0.999 * second[n] + 0.001 * (g * g).detach()
                        root = (second[n] / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8
                        update = first[n] / (1 - 0.9 ** (k + 1)) / root
                    rate = lr if logarithms is None else logarithms[n].exp()[min(k, len(rates[n]) - 1)]
                    at = {**at, n: at[n] - rate * update} if only(n) else at
            loss = response_loss(self.model, at, self.examples(task, "query", query_batch))
            wanted = list(leaves.values()) + ([] if rates is None else list(logarithms.values()))
            exact = torch.autograd.grad(loss, wanted, materialize_grads=True)
            for n, g in zip(leaves, exact[: len(leaves)], strict=True):
                total[n] += g / len(episodes)
            for n, g in zip(rates or {}, exact[len(leaves) :], strict=True):
                of_rates[n] += g / len(episodes)
        return total, of_rates

    def joint_gradient(self, theta, own, episodes):
        """LoRA-ML: all batches of an episode at theta with the task's own ranks in the place of its last ones.

        Args:
            own: task -> name -> its ranks, rows of A and columns of B.

        Returns:
            The mean over tasks and batches by theta, 0 in those ranks; and task -> name -> that by its own ranks.
        """

        def split(name, tensor, size):
            dim = 0 if "lora_A" in name else 1
            return tensor.split([tensor.shape[dim] - size, size], dim), dim

        total = {n: torch.zeros_like(t) for n, t in theta.items()}
        of_tasks = {}
        for task, support_batches, query_batch in episodes:
            at = {}
            for n, t in theta.items():
                (shared, _), dim = split(n, t, own[task][n].shape[0 if "lora_A" in n else 1])
                at[n] = torch.cat([shared, own[task][n]], dim)
            batches = [self.examples(task, "support", b) for b in support_batches]
            batches.append(self.examples(task, "query", query_batch))
            of_tasks[task] = {n: torch.zeros_like(t) for n, t in own[task].items()}
            for batch in batches:
                for n, g in self.gradient(at, batch)[0].items():
                    (shared, part), dim = split(n, g, own[task][n].shape[0 if "lora_A" in n else 1])
                    total[n] += torch.cat([shared, torch.zeros_like(part)], dim) / len(batches) / len(episodes)
                    of_tasks[task][n] += part / len(batches)
        return total, of_tasks

    def mean_difference(self, theta, episodes, lr, optimizer="sgd"):
        """Reptile's direction: mean over tasks of theta_i - theta."""
        total = {n: torch.zeros_like(t) for n, t in theta.items()}
        for task, support_batches, _ in episodes:
            adapted = self.adapt(theta, task, support_batches, lr, optimizer)
            for name in total:
                total[name] += (adapted[name] - theta[name]) / len(episodes)
        return total


def relative_error(result, expected):
    """Norm of the difference over all tensors, relative to the norm of ``expected``; of groups of them the largest."""
    assert result.keys() == expected.keys(), set(result) ^ set(expected)
    if isinstance(next(iter(expected.values())), dict):
        return max(relative_error(result[key], expected[key]) for key in expected)
    difference = sum(((result[n].double() - expected[n].double()) ** 2).sum() for n in expected)
    size = sum((expected[n].double() ** 2).sum() for n in expected)
    assert size > 0, "the expected gradient is zero: the comparison would prove nothing"
    return float((difference / size) ** 0.5)
