"""The pipeline as simpy processes, written from the words of its model: a second opinion.

Every micro-batch is a process that queues for resources; nothing is computed by recurrence, and
nothing is imported from the package. A resource admits its users in the model's fixed order: a
turn is (token, layer, micro-batch), for a set that serves in turn followed by the instance.
"""

import simpy


class Turns:
    """A resource that serves one user at a time, in the order given when it is made."""

    def __init__(self, env, order):
        self.env = env
        self.order = list(order)
        self.waiting = {}
        self.busy_s = 0.0
        self._call()

    def _call(self):
        if self.order and self.order[0] in self.waiting:
            self.waiting.pop(self.order[0]).succeed()

    def use(self, turn, seconds):
        admitted = self.env.event()
        self.waiting[turn] = admitted
        self._call()
        yield admitted
        yield self.env.timeout(seconds)
        self.busy_s += seconds
        self.order.pop(0)
        self._call()


class Pass:
    """One pass of a set over a micro-batch of several instances: it starts when all are there."""

    def __init__(self, env, parties):
        self.env, self.missing, self.done = env, parties, env.event()

    def arrive(self, resource, turn, seconds):
        self.missing -= 1
        if self.missing == 0:
            self.env.process(self._run(resource, turn, seconds))
        yield self.done

    def _run(self, resource, turn, seconds):
        yield from resource.use(turn, seconds)
        self.done.succeed()


class Pipeline:
    """All resources of a case, and when each token of each micro-batch was done.

    ``case`` holds plain lists: layers [(kind, remote)], instances [{attention, slope, a2f, f2a,
    latency, context[j], set_of[j]}], sets [{kind: seconds}], micro_batches, between, plan_context,
    in_turn.
    """

    def __init__(self, case, tokens):
        self.env, self.case, self.tokens = simpy.Environment(), case, tokens
        self.micro_batches = range(case["micro_batches"])
        self.remote = [number for number, (_, far) in enumerate(case["layers"]) if far]
        attended, wired = self._order(range(len(case["layers"]))), self._order(self.remote)
        instances = case["instances"]
        self.attention = [Turns(self.env, attended) for _ in instances]
        self.a2f = [Turns(self.env, wired) for _ in instances]
        self.f2a = [Turns(self.env, wired) for _ in instances]
        self.passes, self.ends = {}, {}
        self.sets = [self._set(number) for number in range(len(case["sets"]))]

    def _order(self, layers):
        tokens = range(self.tokens)
        return [(t, layer, j) for t in tokens for layer in layers for j in self.micro_batches]

    def _set(self, number):
        order = []
        for t, layer, j in self._order(self.remote):
            instances = self.case["instances"]
            served = [i for i, one in enumerate(instances) if one["set_of"][j] == number]
            if self.case["in_turn"]:
                order += [(t, layer, j, i) for i in served]
            elif served:
                order.append((t, layer, j))
                self.passes[number, t, layer, j] = Pass(self.env, len(served))
        return Turns(self.env, order)

    def micro_batch(self, i, j):
        """One micro-batch of one instance, through all tokens and layers."""
        one = self.case["instances"][i]
        for t in range(self.tokens):
            above = one["context"][j] + t - self.case["plan_context"]
            for layer, (kind, far) in enumerate(self.case["layers"]):
                turn = (t, layer, j)
                seconds = one["attention"][kind] + one["slope"] * above
                seconds += self.case["between"] if layer == 0 else 0.0
                yield from self.attention[i].use(turn, max(seconds, 0.0))
                if far:
                    yield from self.a2f[i].use(turn, one["a2f"])
                    yield self.env.timeout(one["latency"])
                    yield from self.ffn(i, one["set_of"][j], kind, turn)
                    yield from self.f2a[i].use(turn, one["f2a"])
                    yield self.env.timeout(one["latency"])
            self.ends[t, j, i] = self.env.now

    def ffn(self, i, number, kind, turn):
        """What a micro-batch waits for at its set."""
        seconds = self.case["sets"][number][kind]
        if self.case["in_turn"]:
            yield from self.sets[number].use((*turn, i), seconds)
        else:
            yield from self.passes[number, *turn].arrive(self.sets[number], turn, seconds)


def run(case, tokens):
    """Return {(token, micro-batch, instance): done at} and the busy seconds of each set."""
    pipeline = Pipeline(case, tokens)
    for i in range(len(case["instances"])):
        for j in pipeline.micro_batches:
            pipeline.env.process(pipeline.micro_batch(i, j))
    pipeline.env.run()
    return pipeline.ends, [resource.busy_s for resource in pipeline.sets]
