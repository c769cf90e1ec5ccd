import assert from "node:assert/strict";
import { webcrypto } from "node:crypto";
import { describe, test } from "node:test";

import { client, cut, hurry, listen, ok, refusal, replace, serve, sleep, until } from "../support.js";

const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/;

function numbered(client, count, from = 0) {
  for (let n = from; n < from + count; n++) client.send({ n });
}

const range = (count) => Array.from({ length: count }, (_, n) => n);

describe("a request", () => {
  test("has the key, and events with table, time, id and what is always there", async (t) => {
    const server = await serve(t);
    const events = client(t, `${server.url}/`, { app: "a b", always: { platform: "web" } });
    const before = Date.now() / 1000;
    assert.equal(events.send({ n: 1 }), true);
    events.send({ n: 2, platform: "ios" }, "other");
    await events.flush();
    const [{ path, headers, body }] = server.requests;
    assert.equal(path, "/apps/a%20b/events");
    assert.match(headers["content-type"], /^text\/plain/);
    assert.equal(body.secret_key, "key");
    const [first, second] = body.events;
    assert.match(first.id, UUID);
    assert.notEqual(first.id, second.id);
    assert.ok(first.time >= before && first.time <= Date.now() / 1000);
    assert.deepEqual({ ...first, time: 0, id: "" }, { _t: "t", time: 0, id: "", platform: "web", n: 1 });
    assert.deepEqual({ ...second, time: 0, id: "" }, { _t: "other", time: 0, id: "", platform: "ios", n: 2 });
  });

  test("has other names for time and id, or neither, or the event's own", async (t) => {
    const server = await serve(t);
    const named = client(t, server, { time: "at", id: "key" });
    named.send({});
    await named.flush();
    const neither = client(t, server, { time: false, id: false });
    neither.send({});
    await neither.flush();
    const own = client(t, server);
    own.send({ time: 5, id: "mine" });
    await own.flush();
    const [[a], [b], [c]] = server.requests.map((request) => request.events);
    assert.deepEqual(Object.keys(a), ["_t", "at", "key"]);
    assert.deepEqual(b, { _t: "t" });
    assert.deepEqual(c, { _t: "t", time: 5, id: "mine" });
  });

  test("has a UUID where there is no crypto.randomUUID, and no crypto at all", async (t) => {
    const server = await serve(t);
    const events = client(t, server);
    for (const poor of [{ getRandomValues: (bytes) => webcrypto.getRandomValues(bytes) }, undefined]) {
      replace(t, "crypto", poor);
      events.send({});
    }
    await events.flush();
    for (const { id } of server.requests[0].events) assert.match(id, UUID);
  });

  test("is sent after a while, and all that came together", async (t) => {
    const server = await serve(t);
    const events = client(t, server, { waitMs: 150 });
    const start = performance.now();
    numbered(events, 3);
    await until(() => events.pending === 0);
    assert.deepEqual(
      server.requests.map((request) => request.numbers),
      [[0, 1, 2]],
    );
    assert.ok(server.requests[0].at - start >= 140);
  });

  test("is sent at once with 50 events, or with enough bytes", async (t) => {
    const server = await serve(t);
    const events = client(t, server, { waitMs: 60_000 });
    numbered(events, 49);
    await sleep(50);
    assert.equal(server.requests.length, 0);
    numbered(events, 1, 49);
    await until(() => events.pending === 0);
    assert.deepEqual(
      server.requests.map((request) => request.numbers),
      [range(50)],
    );
    events.send({ n: 50, text: "x".repeat(20_000) });
    await sleep(50);
    assert.equal(server.requests.length, 1);
    events.send({ n: 51, text: "x".repeat(20_000) });
    await until(() => events.pending === 0);
    assert.deepEqual(
      server.requests.slice(1).map((request) => request.numbers),
      [[50], [51]],
    );
  });

  test("counts bytes of UTF-8", async (t) => {
    const server = await serve(t);
    const events = client(t, server, { batchBytes: 1_000 });
    for (let n = 0; n < 4; n++) events.send({ n, text: "語".repeat(140) }); // 420 bytes, 140 units
    await events.flush();
    assert.equal(server.requests.length, 4);
  });

  test("is the only one at a time, and keeps the order", async (t) => {
    const slow = { ...ok, delayMs: 30 };
    const server = await serve(t, slow, slow, slow);
    const events = client(t, server, { batchEvents: 10 });
    for (let n = 0; n < 100; n += 5) {
      numbered(events, 5, n);
      await sleep(2);
    }
    await events.flush();
    assert.deepEqual(server.numbers(), range(100));
    assert.equal(server.most, 1);
  });

  test("does not follow the last one at once for the sake of a few events", async (t) => {
    const server = await serve(t, { ...ok, delayMs: 100 });
    const events = client(t, server, { waitMs: 400 });
    numbered(events, 1);
    events.flush();
    await sleep(30);
    numbered(events, 1, 1);
    await sleep(200);
    assert.equal(server.requests.length, 1);
    await until(() => events.pending === 0);
    numbered(events, 1, 2); // The timer that ran during the request does not keep others from running.
    await until(() => events.pending === 0);
    assert.deepEqual(server.numbers(), range(3));
  });

  test("waits for its time also when the timer ran out during another one", async (t) => {
    const server = await serve(t, { ...ok, delayMs: 150 });
    const events = client(t, server, { waitMs: 50 });
    numbered(events, 1);
    await until(() => server.requests.length === 1);
    numbered(events, 1, 1);
    await until(() => events.pending === 0);
    numbered(events, 1, 2);
    await until(() => events.pending === 0);
    assert.deepEqual(server.numbers(), range(3));
  });

  test("is compressed where that pays, and not after a failure", async (t) => {
    hurry(t, 20);
    const server = await serve(t, ok, ok, cut, ok);
    const events = client(t, server, { waitMs: 60_000 });
    events.send({ n: 0 });
    await events.flush();
    events.send({ n: 1, text: "x".repeat(5_000) });
    await events.flush();
    events.send({ n: 2, text: "x".repeat(5_000) });
    await events.flush();
    const codings = server.requests.map((request) => request.headers["content-encoding"]);
    assert.deepEqual(codings, [undefined, "gzip", "gzip", undefined]);
    assert.ok(server.requests[1].bytes < 500);
    assert.deepEqual(server.numbers(), [0, 1, 2, 2]);
  });

  test("is not compressed where there is no CompressionStream", async (t) => {
    replace(t, "CompressionStream", undefined);
    const server = await serve(t);
    const events = client(t, server);
    events.send({ text: "x".repeat(5_000) });
    await events.flush();
    assert.equal(server.requests[0].headers["content-encoding"], undefined);
  });
});

describe("a verdict", () => {
  test("200 forgets the events", async (t) => {
    const server = await serve(t);
    const events = client(t, server);
    numbered(events, 3);
    assert.equal(events.pending, 3);
    await events.flush();
    assert.equal(events.pending, 0);
    await events.flush();
    assert.equal(server.requests.length, 1);
  });

  test("200 tells each warning once", async (t) => {
    const lines = listen(t);
    const warned = (...warnings) => ({ status: 200, body: { accepted: 1, warnings } });
    const server = await serve(
      t,
      warned('events[0]: unknown key "a"', 'events[1]: unknown key "a"'),
      warned('events[7]: unknown key "a"', 'events[7]: unknown key "b"'),
      { status: 200, body: { accepted: 0, quarantined: [{ index: 0, column: "score", reason: "too high" }] } },
      { status: 200, body: { warnings: 5, quarantined: [null] } },
    );
    const events = client(t, server);
    for (let n = 0; n < 4; n++) {
      numbered(events, 1);
      await events.flush();
    }
    assert.deepEqual(lines, [
      'Attolytics: unknown key "a"',
      'Attolytics: unknown key "b"',
      "Attolytics: quarantined: score: too high",
    ]);
  });

  test("400 drops the events it names, and sends the others again", async (t) => {
    const lines = listen(t);
    const problems = [
      { index: 1, column: "n", reason: "too odd" },
      { index: 3, column: null, reason: "too odd" },
      { index: 3, column: "n", reason: "too odd" },
    ];
    const again = [{ index: 0, column: "n", reason: "too odd" }];
    const server = await serve(
      t,
      refusal(400, "do not fit", problems),
      ok,
      refusal(400, "does not fit", again),
      refusal(400, "does not fit", again),
    );
    const refused = [];
    const options = { onRefused: (events, reason) => refused.push([events.map((event) => event.n), reason]) };
    const events = client(t, server, options);
    for (const [count, from] of [
      [5, 0],
      [1, 5],
      [1, 6],
    ]) {
      numbered(events, count, from);
      await events.flush();
    }
    assert.deepEqual(
      server.requests.map((request) => request.numbers),
      [range(5), [0, 2, 4], [5], [6]],
    );
    assert.deepEqual(refused, [
      [[1, 3], "n: too odd; too odd"],
      [[5], "n: too odd"],
      [[6], "n: too odd"],
    ]);
    assert.deepEqual(
      lines,
      ["n: too odd; too odd", "n: too odd"].map((text) => `Attolytics: events were refused: ${text}`),
    );
  });

  test("400 that names none is narrowed down to the event that is at fault", async (t) => {
    listen(t);
    const server = await serve(t);
    const judge = (events) =>
      events.some((event) => event.n === 13)
        ? refusal(400, "refused by the database", [{ index: null, column: null, reason: "check failed" }])
        : ok;
    server.answers = Array(40).fill(judge);
    const refused = [];
    const events = client(t, server, {
      onRefused: (events, reason) => refused.push([events[0].n, events.length, reason]),
    });
    numbered(events, 50);
    await events.flush();
    assert.deepEqual(refused, [[13, 1, "check failed"]]);
    const stored = server.requests
      .filter((request) => !request.numbers.includes(13))
      .flatMap((request) => request.numbers);
    assert.deepEqual(
      stored,
      range(50).filter((n) => n !== 13),
    );
    assert.ok(server.requests.length < 20, `${server.requests.length}`);
  });

  for (const [status, error] of [
    [403, "the secret key is wrong"],
    [404, "there is no such app"],
    [415, "no"],
  ]) {
    test(`${status} drops the batch, and says so once`, async (t) => {
      const lines = listen(t);
      const refused = [];
      const server = await serve(t, refusal(status, error), refusal(status, error));
      const events = client(t, server, { batchEvents: 2, onRefused: (...words) => refused.push(words) });
      numbered(events, 4);
      await events.flush();
      numbered(events, 1, 4);
      await events.flush();
      assert.deepEqual(
        server.requests.map((request) => request.numbers),
        [[0, 1], [2, 3], [4]],
      );
      assert.deepEqual(lines, [`Attolytics: events were refused: ${error}`]);
      assert.deepEqual(
        refused.map(([events, reason]) => [events.length, reason]),
        [
          [2, error],
          [2, error],
        ],
      );
    });
  }

  test("404 that names events drops only these", async (t) => {
    const lines = listen(t);
    const server = await serve(t, refusal(404, "no such table", [{ index: 0, column: "_t", reason: 'no table "x"' }]));
    const events = client(t, server);
    events.send({ n: 0 }, "x");
    numbered(events, 1, 1);
    await events.flush();
    assert.deepEqual(
      server.requests.map((request) => request.numbers),
      [[0, 1], [1]],
    );
    assert.deepEqual(lines, ['Attolytics: events were refused: _t: no table "x"']);
  });

  test("413 halves the batch, and drops a single event that is too large", async (t) => {
    const lines = listen(t);
    const server = await serve(t);
    const judge = (events) =>
      JSON.stringify(events).length > 700 ? { status: 413, body: "<html>from nginx</html>" } : ok;
    server.answers = Array(40).fill(judge);
    const refused = [];
    const events = client(t, server, { onRefused: (events) => refused.push(...events.map((event) => event.n)) });
    for (let n = 0; n < 20; n++) events.send({ n, text: "x".repeat(n === 7 ? 1_000 : 10) });
    await events.flush();
    assert.deepEqual(refused, [7]);
    assert.deepEqual(lines, ["Attolytics: events were refused: status 413"]);
    const stored = server.requests.filter(({ events }) => judge(events) === ok).flatMap((request) => request.numbers);
    assert.deepEqual(
      stored,
      range(20).filter((n) => n !== 7),
    );
  });

  for (const [name, answer] of [
    ["408", refusal(408, "too slow")],
    ["429", refusal(429, "too many")],
    ["429 from nginx", { status: 429, body: "<html>" }],
    ["500", { status: 500 }],
    ["503", refusal(503, "busy")],
    ["no answer", cut],
    ["a page for logging in", { status: 200, body: "<html>" }],
    ["a redirect", { status: 302, headers: { Location: "/login" } }],
    ["a 404 that is not the server's", { status: 404 }],
    ["204", { status: 204 }],
  ]) {
    test(`${name} keeps the events, in order, with their ids`, async (t) => {
      listen(t);
      const delays = hurry(t, 20);
      const server = await serve(t, answer);
      const events = client(t, server, { onRefused: () => assert.fail() });
      numbered(events, 3);
      const flushed = events.flush();
      await until(() => server.requests.length === 1);
      numbered(events, 2, 3);
      await flushed;
      await events.flush();
      assert.deepEqual(server.requests[0].events, server.requests[1].events.slice(0, 3));
      assert.deepEqual(server.numbers().slice(3), range(5));
      assert.ok(
        delays.some((ms) => ms >= 1_000 && ms <= 2_000),
        `${delays}`,
      );
    });
  }

  test("an answer that takes too long is none", async (t) => {
    hurry(t, 20);
    const server = await serve(t, { ...ok, delayMs: 60_000 });
    const events = client(t, server, { timeoutMs: 2_000 });
    numbered(events, 1);
    await events.flush();
    assert.deepEqual(server.numbers(), [0, 0]);
  });

  test("Retry-After is obeyed, as seconds and as a date, up to five minutes", async (t) => {
    const delays = hurry(t, 2_000);
    const busy = (after) => ({ ...refusal(503, "busy"), headers: { "Retry-After": after } });
    const date = new Date(Date.now() + 100_000).toUTCString();
    const server = await serve(t, busy("40"), busy(date), busy("86400"));
    const events = client(t, server, { timeoutMs: 20_000_000 });
    numbered(events, 1);
    await events.flush();
    assert.ok(delays.includes(40_000), `${delays}`);
    assert.ok(
      delays.some((ms) => ms > 95_000 && ms <= 100_000),
      `${delays}`,
    );
    assert.ok(delays.includes(300_000), `${delays}`);
    assert.ok(Math.max(...delays.filter((ms) => ms !== 20_000_000)) <= 300_000);
  });

  test("the back-off doubles up to five minutes, with jitter, and starts anew after a success", async (t) => {
    const delays = hurry(t, 10_000);
    const server = await serve(t, ...Array(12).fill(cut), ok, cut);
    const events = client(t, server, { waitMs: 7, timeoutMs: 8 * 10_000_000 });
    numbered(events, 1);
    await events.flush();
    numbered(events, 1, 1);
    await events.flush();
    const waits = delays.filter((ms) => ms >= 1_000 && ms <= 300_000 && !Number.isInteger(ms)); // fetch has its own
    assert.equal(waits.length, 13);
    waits.slice(0, 12).forEach((ms, n) => {
      const base = Math.min(1_000 * 2 ** n, 150_000);
      assert.ok(ms >= base && ms <= 2 * base, `${n}: ${ms}`);
    });
    assert.ok(waits[12] <= 2_000);
    assert.equal(new Set(waits).size, 13);
  });

  test("the browser's word that it is online ends the wait", async (t) => {
    const target = new EventTarget();
    replace(t, "addEventListener", target.addEventListener.bind(target));
    replace(t, "removeEventListener", target.removeEventListener.bind(target));
    const server = await serve(t, { ...refusal(503, "busy"), headers: { "Retry-After": "60" } });
    const events = client(t, server);
    numbered(events, 1);
    await until(() => server.requests.length === 1);
    await sleep(50);
    numbered(events, 60, 1); // Others do not end it.
    await sleep(50);
    assert.equal(server.requests.length, 1);
    target.dispatchEvent(new Event("online"));
    await until(() => events.pending === 0);
    assert.deepEqual(server.numbers().slice(1), range(61));
    events.stop();
    numbered(events, 1);
    target.dispatchEvent(new Event("online"));
    await sleep(50);
    assert.equal(server.requests.length, 3);
  });

  test("a callback that throws harms nobody", async (t) => {
    const lines = listen(t);
    const server = await serve(t, refusal(403, "no"));
    const events = client(t, server, {
      onRefused: () => {
        throw new Error("oops");
      },
    });
    numbered(events, 1);
    await events.flush();
    numbered(events, 1, 1);
    await events.flush();
    assert.deepEqual(server.numbers(), [0, 1]);
    assert.deepEqual(lines, ["Attolytics: events were refused: no", "Attolytics: onRefused failed: Error: oops"]);
  });
});
