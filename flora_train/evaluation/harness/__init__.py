"""lm-evaluation-harness: the base and all adapters of a run, evaluated in one pass over the requests.

evaluation.py   collects the requests of tasks, computes all answers, and lets lm_eval make each result
tasks.py        finds and loads lm_eval's tasks, and collects their requests
model.py        the model of lm_eval: prompts by its conventions, answers from memory
answers.py      the answers of all contenders, which each result is made of
requests.py     what is computed: tokens to score, prompts to continue, results
scoring.py      log-probabilities of continuations
batches.py      which rows are scored together
generation.py   continuations, by the mixed decoder
logit_rules.py  generation settings of a task, as rules that change logits
results.py      what lm_eval makes of the answers of one contender
package.py      whether lm_eval is installed
comparison.py   the results of all contenders side by side

lm_eval is an optional package: `tasks`, `model`, `results` and `evaluation` import it and are imported by the
command only after `package.check_installed`.
"""
