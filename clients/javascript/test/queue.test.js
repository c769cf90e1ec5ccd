import assert from "node:assert/strict";
import { describe, test } from "node:test";

import { Attolytics } from "../attolytics.js";
import {
  client,
  cut,
  hurry,
  listen,
  Locks,
  MemoryStorage,
  ok,
  refusal,
  replace,
  serve,
  sleep,
  until,
} from "../support.js";

function numbered(client, count, from = 0) {
  for (let n = from; n < from + count; n++) client.send({ n });
}

const range = (count, from = 0) => Array.from({ length: count }, (_, n) => from + n);
/** For a client that has a queue, but is dead: it sends only when it is told. */
const NEVER = { waitMs: 100_000, batchEvents: 1_000 };
const sorted = (numbers) => [...numbers].sort((a, b) => a - b);

/** Open a tab of a browser with these Web Locks, or with none. */
function tab(t, locks) {
  if (!locks) return replace(t, "navigator", {});
  const tab = locks.tab();
  replace(t, "navigator", { locks: tab });
  return tab;
}

describe("send", () => {
  test("never throws, and says what it did not take", async (t) => {
    const lines = listen(t);
    const server = await serve(t);
    const events = client(t, server);
    const cyclic = {};
    cyclic.self = cyclic;
    const bad = [
      cyclic,
      { n: 1n },
      null,
      5,
      "text",
      [1],
      Symbol("x"),
      () => {},
      {
        get n() {
          throw new Error("getter");
        },
      },
      {
        n: {
          toJSON() {
            throw Symbol("odd");
          },
        },
      },
      {
        n: {
          toJSON() {
            throw Object.create(null);
          },
        },
      },
      { n: "x".repeat(2_000_000) },
    ];
    for (const event of bad) assert.equal(events.send(event), false);
    assert.equal(events.send({ n: 1 }), true);
    assert.equal(events.send(), true);
    await events.flush();
    assert.equal(server.requests[0].events.length, 2);
    assert.ok(lines.length >= 4, lines.join("\n"));
    lines.forEach((line) => assert.match(line, /^Attolytics: an event was dropped: /));
  });

  test("takes what JSON can only say in another way", async (t) => {
    const server = await serve(t);
    const events = client(t, server);
    events.send({ n: NaN, d: new Date(0), u: undefined, s: "\ud800 \u2028 \0", always: [] });
    await events.flush();
    const [{ n, d, s, ...rest }] = server.requests[0].events;
    assert.deepEqual([n, d, s, "u" in rest], [null, "1970-01-01T00:00:00.000Z", "\ud800 \u2028 \0", false]);
  });

  test("needs a url, an app and a key", () => {
    assert.throws(() => new Attolytics(), /"url" is missing/);
    assert.throws(() => new Attolytics({ url: "http://a.b", app: "c" }), /"key" is missing/);
  });

  test("does not keep Node from ending, but for what is under way", async (t) => {
    const { execFile } = await import("node:child_process");
    const server = await serve(t, cut);
    const script = `
      import { Attolytics } from "./attolytics.js";
      new Attolytics({ url: "${server.url}", app: "a", key: "k", table: "t", waitMs: 1 }).send({ n: 1 });`;
    const start = performance.now();
    const cwd = new URL("..", import.meta.url);
    await new Promise((resolve) => execFile(process.execPath, ["--input-type=module", "-e", script], { cwd }, resolve));
    assert.deepEqual(server.numbers(), [1]);
    const flushed =
      script.replace("new ", "const events = new ").replace(".send(", "; events.send(") + "await events.flush();";
    server.answers = [cut];
    await new Promise((resolve) =>
      execFile(process.execPath, ["--input-type=module", "-e", flushed], { cwd }, resolve),
    );
    assert.deepEqual(server.numbers(), [1, 1, 1]);
    assert.ok(performance.now() - start < 8_000);
  });
});

describe("the queue", () => {
  test("is bounded: the oldest events are dropped and counted", async (t) => {
    const lines = listen(t);
    const storage = new MemoryStorage();
    const server = await serve(t);
    const events = client(t, server, { ...NEVER, storage, queueBytes: 10_000 });
    for (let n = 0; n < 200; n++) events.send({ n, text: "x".repeat(100) });
    const kept = storage.numbers;
    assert.equal(events.dropped + events.pending, 200);
    assert.deepEqual(kept, range(events.pending, events.dropped));
    const bytes = storage.events().reduce((sum, event) => sum + JSON.stringify(event).length, 0);
    assert.ok(bytes <= 10_000 && bytes > 9_700, `${bytes}`);
    await events.flush();
    assert.deepEqual(server.numbers(), kept);
    assert.deepEqual(lines, ["Attolytics: the queue is full, the oldest events are dropped"]);
  });

  test("drops nothing that is under way, and takes the new", async (t) => {
    listen(t);
    const server = await serve(t, { ...ok, delayMs: 100 });
    const events = client(t, server, { queueBytes: 1_000 });
    events.send({ n: 0, text: "x".repeat(700) });
    const flushed = events.flush();
    await until(() => server.requests.length === 1);
    events.send({ n: 1, text: "x".repeat(700) });
    await flushed;
    await events.flush();
    assert.deepEqual([server.numbers(), events.dropped], [[0, 1], 0]);
  });

  test("is in the storage until there is a verdict", async (t) => {
    const storage = new MemoryStorage();
    const server = await serve(
      t,
      () => {
        assert.deepEqual(storage.numbers, [0, 1]);
        return ok;
      },
      refusal(403, "no"),
    );
    listen(t);
    const events = client(t, server, { storage, ...NEVER });
    numbered(events, 2);
    assert.deepEqual(storage.numbers, [0, 1]);
    await events.flush();
    assert.deepEqual(storage.numbers, []);
    numbered(events, 1);
    await events.flush();
    assert.deepEqual(storage.numbers, []);
    events.stop();
    assert.equal(storage.map.size, 0);
  });

  test("is sent by the next client, once, with the ids it had", async (t) => {
    const storage = new MemoryStorage();
    const server = await serve(t);
    const first = client(t, server, { storage, ...NEVER });
    numbered(first, 120);
    const kept = storage.events();
    first.stop();
    await sleep(2); // Two tabs in the same millisecond have no order.
    const second = client(t, server, { storage, waitMs: 10_000 });
    second.send({ n: 120 });
    await second.flush();
    assert.deepEqual(
      server.requests.map((request) => request.numbers.length),
      [50, 50, 21],
    );
    assert.deepEqual(server.numbers(), range(121));
    const sent = server.requests.flatMap((request) => request.events);
    assert.deepEqual(sorted(sent.slice(0, 120).map(({ id }) => id)), sorted(kept.map(({ id }) => id)));
    assert.equal(storage.events().length, 0);
  });

  test("belongs to a server and an app", async (t) => {
    const storage = new MemoryStorage();
    const server = await serve(t);
    const first = client(t, server, { storage, ...NEVER });
    numbered(first, 1);
    first.stop();
    const other = client(t, server, { storage, app: "another" });
    other.send({ n: 1 });
    await other.flush();
    assert.deepEqual(server.numbers(), [1]);
    assert.deepEqual(storage.numbers, [0]);
    other.forget();
    assert.deepEqual(storage.numbers, [0]);
  });

  test("is in memory where the storage is full", async (t) => {
    const storage = new MemoryStorage();
    storage.fails = (method) => {
      if (method === "setItem" && storage.map.size > 3) throw new DOMException("full", "QuotaExceededError");
    };
    const server = await serve(t);
    const events = client(t, server, { storage, ...NEVER });
    numbered(events, 10);
    assert.ok(storage.numbers.length < 5);
    await events.flush();
    assert.deepEqual(server.numbers(), range(10));
    assert.deepEqual(storage.numbers, []);
  });

  for (const broken of ["length", "key", "getItem", "setItem", "removeItem", "all"]) {
    test(`is in memory where the storage fails: ${broken}`, async (t) => {
      const storage = new MemoryStorage();
      const server = await serve(t, refusal(503, "busy"));
      hurry(t, 20);
      const first = client(t, server, { storage, ...NEVER });
      numbered(first, 1);
      storage.fails = (method) => {
        if (method === broken || broken === "all") throw new Error("broken");
      };
      numbered(first, 2, 1);
      await first.flush();
      assert.deepEqual(server.numbers(), [0, 1, 2, 0, 1, 2]);
      first.stop();
      const second = client(t, server, { storage });
      numbered(second, 1, 3);
      await second.flush();
      assert.equal(server.numbers().at(-1), 3);
      second.forget();
    });
  }

  test("is not stopped by what is corrupt in the storage", async (t) => {
    const lines = listen(t);
    const storage = new MemoryStorage();
    const server = await serve(t);
    const first = client(t, server, { storage, ...NEVER });
    numbered(first, 12);
    first.stop();
    const keys = [...storage.map.keys()];
    const bad = ['{"n":', "", "null", "5", "[1]", '"x"', "\ud800", '{"n": 1}'];
    bad.forEach((text, n) => storage.map.set(keys[n], text));
    storage.map.set(keys[8].replace(/\w+-/, "zzzzzzzzzzzzzzz-"), storage.map.get(keys[8])); // A stamp beyond all clocks.
    storage.map.set(keys[8].replace(/\S+$/, "odd"), "odd");
    storage.map.set("score", "7");
    await sleep(2); // Two tabs in the same millisecond have no order.
    const second = client(t, server, { storage, waitMs: 10_000 });
    numbered(second, 1, 12);
    await second.flush();
    assert.deepEqual(server.numbers(), [8, 9, 10, 11, 12]);
    assert.equal(lines.length, 1);
    assert.equal(storage.map.get("score"), "7");
    assert.deepEqual([...storage.map.keys()].filter((key) => !key.includes("~") && key !== "score").length, 1);
  });

  test("goes on when the clock is set back", async (t) => {
    const storage = new MemoryStorage();
    const server = await serve(t);
    const events = client(t, server, { storage, ...NEVER });
    const now = Date.now();
    for (let n = 0; n < 5; n++) {
      t.mock.method(Date, "now", () => now - n * 1_000_000);
      events.send({ n });
    }
    await events.flush();
    assert.deepEqual(server.numbers(), range(5));
    assert.deepEqual(storage.numbers, []);
  });
});

describe("two tabs", () => {
  for (const locked of [true, false]) {
    const how = locked ? "with Web Locks" : "with time stamps";

    test(`${how} send nothing twice, at the same moment`, async (t) => {
      const [storage, locks, server] = [new MemoryStorage(), locked && new Locks(), await serve(t)];
      t.mock.method(Date, "now", () => 1_700_000_000_000); // Their stamps are equal.
      const tabs = [0, 1].map(() => {
        tab(t, locks);
        return client(t, server, { storage, batchEvents: 10 });
      });
      for (let n = 0; n < 100; n++) {
        tabs[n % 2].send({ n });
        if (n % 10 === 0) await sleep(3);
      }
      await Promise.all(tabs.map((events) => events.flush()));
      assert.deepEqual(sorted(server.numbers()), range(100));
      assert.deepEqual(storage.numbers, []);
    });

    test(`${how} adopt the queue of a tab that is gone, once`, async (t) => {
      const [storage, locks, server] = [new MemoryStorage(), locked && new Locks(), await serve(t)];
      t.mock.method(Date, "now", () => 1_700_000_000_000); // All stamps are equal.
      const dying = [0, 10].map((from) => {
        const its = tab(t, locks);
        numbered(client(t, server, { storage, ...NEVER }), 10, from);
        return its;
      });
      await sleep(10);
      if (locked) dying.forEach((its) => its.close());
      for (const key of storage.map.keys()) {
        if (key.includes(" ~")) storage.map.set(key, "1699999800000");
      }
      const living = [0, 1, 2].map(() => {
        tab(t, locks);
        return client(t, server, { storage });
      });
      living[0].send({ n: 20 });
      await Promise.all(living.map((events) => events.flush()));
      await until(() => storage.numbers.length === 0);
      assert.deepEqual(sorted(server.numbers()), range(21));
    });

    test(`${how} leave the queue of a living tab alone`, async (t) => {
      const [storage, locks, server] = [new MemoryStorage(), locked && new Locks(), await serve(t)];
      tab(t, locks);
      const first = client(t, server, { storage, ...NEVER });
      numbered(first, 3);
      tab(t, locks);
      const second = client(t, server, { storage });
      numbered(second, 1, 3);
      await second.flush();
      await sleep(700);
      assert.deepEqual(server.numbers(), [3]);
      await first.flush();
      assert.deepEqual(server.numbers(), [3, 0, 1, 2]);
    });

    test(`${how} adopt also what is left while they live`, async (t) => {
      const [storage, locks, server] = [new MemoryStorage(), locked && new Locks(), await serve(t)];
      hurry(t, 20);
      const real = globalThis.setInterval;
      replace(t, "setInterval", (action, ms) => real(action, ms / 200));
      const dying = tab(t, locks);
      const first = client(t, server, { storage, ...NEVER, waitMs: 10_000_000 });
      tab(t, locks);
      client(t, server, { storage });
      numbered(first, 3);
      await sleep(250);
      assert.deepEqual(server.numbers(), []);
      if (locked) dying.close();
      else first.stop();
      await until(() => storage.numbers.length === 0);
      assert.deepEqual(server.numbers(), range(3));
    });
  }

  test("that slept and lost its queue does not send it again, but what is new", async (t) => {
    tab(t, null);
    const [storage, server] = [new MemoryStorage(), await serve(t)];
    const slept = client(t, server, { storage, ...NEVER });
    numbered(slept, 3);
    for (const key of storage.map.keys()) {
      if (key.includes(" ~")) storage.map.set(key, "1");
    }
    const second = client(t, server, { storage });
    await second.flush();
    assert.deepEqual(server.numbers(), range(3));
    numbered(slept, 1, 3);
    await slept.flush();
    assert.deepEqual(server.numbers(), range(4));
    assert.equal(slept.pending, 0);
  });

  test("that claim a queue at the same moment: the last one gets it", async (t) => {
    tab(t, null);
    const [storage, server] = [new MemoryStorage(), await serve(t)];
    const dead = client(t, server, { storage, ...NEVER });
    numbered(dead, 3);
    const stamps = () => [...storage.map.keys()].filter((key) => key.includes(" ~"));
    const [key] = stamps();
    storage.map.set(key, "1");
    const first = client(t, server, { storage });
    storage.map.set(key, `${Date.now()} another`);
    await sleep(700);
    assert.deepEqual([server.numbers(), first.pending, storage.numbers], [[], 0, range(3)]);
    assert.ok(stamps().includes(key));
  });

  test("take a queue over that a page claimed which was left in that moment", async (t) => {
    tab(t, null);
    const [storage, server] = [new MemoryStorage(), await serve(t)];
    numbered(client(t, server, { storage, ...NEVER }), 3);
    const key = [...storage.map.keys()].find((key) => key.includes(" ~"));
    storage.map.set(key, `${Date.now()} another`);
    await client(t, server, { storage }).flush();
    assert.deepEqual(server.numbers(), range(3));
  });

  test("do without Web Locks that are forbidden", async (t) => {
    const [storage, server] = [new MemoryStorage(), await serve(t)];
    replace(t, "navigator", {
      locks: {
        request: async () => {
          throw new DOMException("no", "SecurityError");
        },
      },
    });
    const events = client(t, server, { storage });
    numbered(events, 1);
    await events.flush();
    assert.deepEqual(server.numbers(), [0]);
    assert.equal([...storage.map.keys()].filter((key) => key.includes(" ~")).length, 1);
  });
});

describe("flush", () => {
  test("resolves when all has its verdict, not when something was sent", async (t) => {
    hurry(t, 20);
    const server = await serve(t, cut, refusal(503, "busy"), ok, cut);
    const events = client(t, server, { batchEvents: 5 });
    numbered(events, 10);
    await events.flush();
    assert.equal(events.pending, 0);
    assert.deepEqual(server.numbers().length, 5 * 5);
  });

  test("does not wait for what comes later", async (t) => {
    const server = await serve(t, { ...ok, delayMs: 50 });
    const events = client(t, server, { waitMs: 60_000 });
    numbered(events, 1);
    const flushed = events.flush();
    await until(() => server.requests.length === 1);
    numbered(events, 1, 1);
    await flushed;
    assert.equal(events.pending, 1);
    events.forget();
  });

  test("resolves when nothing more will happen", async (t) => {
    const server = await serve(t, cut, cut);
    const events = client(t, server);
    numbered(events, 1);
    const flushed = Promise.all([events.flush(), events.flush()]);
    await until(() => server.requests.length === 1);
    events.stop();
    await flushed;
    await events.flush();
  });
});

describe("consent", () => {
  test("that is not given: nothing is stored, nothing sent", async (t) => {
    const storage = new MemoryStorage();
    storage.fails = () => assert.fail("touched");
    const server = await serve(t);
    const events = client(t, server, { storage, enabled: false });
    assert.equal(events.send({ n: 1 }), false);
    await events.flush();
    await sleep(50);
    assert.equal(server.requests.length, 0);
    storage.fails = () => {};
    events.enabled = true;
    numbered(events, 1, 2);
    await events.flush();
    assert.deepEqual(server.numbers(), [2]);
  });

  test("that is withdrawn: nothing more is taken, forget() leaves nothing", async (t) => {
    const storage = new MemoryStorage();
    const server = await serve(t, { ...ok, delayMs: 200 });
    const others = client(t, server, { storage, ...NEVER });
    numbered(others, 1);
    const events = client(t, server, { storage, ...NEVER });
    numbered(events, 1, 1);
    const flushed = events.flush();
    await until(() => server.requests.length === 1);
    numbered(events, 1, 2);
    events.enabled = false;
    events.forget();
    assert.equal(events.send({ n: 3 }), false);
    await flushed;
    await others.flush();
    assert.equal(events.pending + others.pending, 0);
    assert.deepEqual(storage.numbers, []);
    await sleep(300);
    assert.deepEqual(server.numbers(), [1]);
    others.stop();
    assert.equal(storage.map.size, 0);
  });

  test("forget() does not harm what comes after it", async (t) => {
    const server = await serve(t, { ...ok, delayMs: 60_000 });
    const events = client(t, server);
    numbered(events, 1);
    const flushed = events.flush();
    await until(() => server.requests.length === 1);
    events.forget();
    await flushed;
    await until(() => server.now === 0); // The request is ended.
    numbered(events, 1, 1);
    await events.flush();
    assert.deepEqual(server.numbers(), [0, 1]);
  });
});

describe("stop", () => {
  test("sends nothing more, and keeps it", async (t) => {
    hurry(t, 20);
    const storage = new MemoryStorage();
    const server = await serve(t, cut);
    const events = client(t, server, { storage });
    numbered(events, 2);
    await until(() => server.requests.length === 1);
    await sleep(10);
    events.stop();
    assert.equal(events.send({ n: 2 }), false);
    await sleep(200);
    assert.equal(server.requests.length, 1);
    assert.deepEqual(storage.numbers, [0, 1]);
    events.enabled = true;
    await events.flush();
    assert.deepEqual(server.numbers(), [0, 1, 0, 1]);
    assert.deepEqual(storage.numbers, []);
  });

  test("still hears the verdict of what is under way", async (t) => {
    const storage = new MemoryStorage();
    const server = await serve(t, { ...ok, delayMs: 50 });
    const events = client(t, server, { storage });
    numbered(events, 2);
    await until(() => server.requests.length === 1);
    events.stop();
    await until(() => storage.map.size === 0);
  });
});
