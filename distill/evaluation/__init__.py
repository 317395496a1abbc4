"""Evaluation of students. suites.py has two tables: EVALUATIONS (all measurements) and SUITES (which are run, how much).

`distill eval` and `distill.evaluate` return a judgement, and write it to a run folder's evaluations.json under "suites", by
the suite's name:

    target, teacher     the student or run that was judged, and its teacher
    suite               the suite's name; "run" for the table that ends a run ("final" in evaluations.json)
    device, precision   "cpu" or a GPU's name; "float32" or "bf16"
    pattern             one letter a layer
    identity            {logits, attention, layer, layers, seconds}, see identity.check_identity; a run's is beside "final"
    rows                {row: {evaluation: result}}; rows as in rows.TITLES, in the order of the table, without chance
      fidelity          see fidelity.fidelity; on the same documents in every row
      passkey           [{length, recalled, trials}]
      recall            {family: [{length, depth (needle alone), recalled, trials, score}]}
      tasks             {task: {metric, score, error, chance, items, correct, acc, acc_norm, perplexity, letters}}, the last
                        four where they apply; correct is "0110..." over the items; or {task: {not_run: reason}}
      speed             {device, method, cells: [{length, batch, prefill_seconds, first_token_seconds,
                        decode_tokens_per_second, peak_bytes, cache_bytes} or {length, batch, not_run}]}, on a GPU with
                        graph_decode_tokens_per_second or graph_not_run
                        Every number is finite: a row whose outputs are not is left out (not_run); a student's are an error
    against_student     {row: {kl, nll, agreement: {difference, error, lower, documents}}}: the student less the row, see
                        pairing.paired
    in_sample           {families, tasks}: what selected the layout; empty if it was not selected
    against_teacher     {row: {passkey, recall, tasks, recovery, speed}}, see judging.against_teacher
    chance              {task: score of guessing}; that of recall is 0
    layers              {layer: relative L2 error of the student's mixer}
    overlap             how much of the held-out text is training text, see distill.text.overlap.overlap; None if the
                        training text is not available
    not_run             [{rows: [row ...], evaluation, part, reason}]: everything that the suite or the machine left out
    seconds             {row: {evaluation: seconds}}
"""
