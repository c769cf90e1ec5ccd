import assert from "node:assert/strict";
import { beforeEach, describe, test } from "node:test";

import { client, cut, hurry, listen, MemoryStorage, ok, refusal, replace, serve, sleep, until } from "../support.js";

const NEVER = { waitMs: 100_000, batchEvents: 1_000, batchBytes: 1_000_000 };
const range = (count) => Array.from({ length: count }, (_, n) => n);
const real = fetch;

/** A page that can be hidden and left, and the options of each fetch it makes. */
function open(t) {
  const page = { made: [], window: new EventTarget() };
  const document = { visibilityState: "visible" };
  for (const name of ["addEventListener", "removeEventListener"]) {
    replace(t, name, page.window[name].bind(page.window));
  }
  replace(t, "document", document);
  replace(t, "localStorage", (page.storage = new MemoryStorage()));
  replace(t, "fetch", (url, options) => {
    const numbers = typeof options.body === "string" ? JSON.parse(options.body).events.map((event) => event.n) : [];
    page.made.push({ ...options, numbers });
    return real(url, options);
  });
  page.show = (state) => {
    document.visibilityState = state;
    page.window.dispatchEvent(new Event("visibilitychange"));
  };
  page.leave = () => page.window.dispatchEvent(new Event("pagehide"));
  page.comeBack = () => page.window.dispatchEvent(Object.assign(new Event("pageshow"), { persisted: true }));
  return page;
}

function numbered(client, count, from = 0, text = "") {
  for (let n = from; n < from + count; n++) client.send({ n, text });
}

describe("a page", () => {
  let page;
  beforeEach((t) => (page = open(t)));

  test("that is hidden sends what is left, at once, in a request that outlives it", async (t) => {
    const server = await serve(t);
    const events = client(t, server, NEVER);
    numbered(events, 100, 0, "x".repeat(100));
    page.show("hidden");
    assert.deepEqual(
      page.made.map(({ numbers, keepalive, headers }) => [numbers, keepalive, headers]),
      [[range(100), true, {}]],
    );
    assert.equal(page.storage.numbers.length, 100); // There is no verdict yet.
    numbered(events, 2, 100);
    page.leave();
    assert.deepEqual(page.made[1].numbers, [100, 101]);
    await until(() => page.storage.numbers.length === 0);
    page.show("visible");
    await sleep(20);
    assert.deepEqual(server.numbers(), range(102));
  });

  test("sends no more than 64 kB at once when it is left, the oldest first", async (t) => {
    const server = await serve(t);
    const others = client(t, server, { ...NEVER, app: "another" });
    numbered(others, 2, 0, "x".repeat(10_000));
    const events = client(t, server, NEVER);
    numbered(events, 100, 0, "語".repeat(300));
    page.leave();
    const sizes = page.made.map(({ body }) => Buffer.byteLength(body));
    assert.ok(sizes[0] + sizes[1] <= 60_000 && sizes[0] + sizes[1] > 58_000, `${sizes}`);
    assert.deepEqual(page.made[1].numbers, range(page.made[1].numbers.length));
  });

  test("does not hand over an event that is too large for that", async (t) => {
    const server = await serve(t);
    const events = client(t, server, NEVER);
    replace(t, "CompressionStream", undefined);
    numbered(events, 1, 0, "x".repeat(70_000));
    page.show("hidden");
    assert.equal(page.made.length, 0);
    await events.flush();
    assert.deepEqual(
      page.made.map(({ keepalive }) => keepalive),
      [false],
    );
  });

  test("sends ordinary requests so that they outlive it, but not after a failure", async (t) => {
    hurry(t, 20);
    const server = await serve(t, refusal(503, "busy"));
    const events = client(t, server);
    numbered(events, 1);
    await events.flush();
    assert.deepEqual(
      page.made.map(({ keepalive }) => keepalive),
      [true, false],
    );
  });

  test("that stays takes the verdict of what it sent when it was hidden", async (t) => {
    listen(t);
    hurry(t, 20);
    const problems = [{ index: 1, column: "n", reason: "no" }];
    const server = await serve(t, refusal(400, "no", problems), refusal(503, "busy"));
    const events = client(t, server, { ...NEVER, waitMs: 100_000_000 });
    numbered(events, 3);
    page.show("hidden");
    await until(() => events.pending === 0);
    assert.deepEqual(
      server.requests.map((request) => request.numbers),
      [
        [0, 1, 2],
        [0, 2],
        [0, 2],
      ],
    );
  });

  test("does not send again what is under way when it is left", async (t) => {
    const server = await serve(t, { ...ok, delayMs: 50 });
    const events = client(t, server);
    numbered(events, 3);
    await until(() => server.requests.length === 1);
    page.show("hidden");
    page.leave();
    await until(() => page.storage.numbers.length === 0);
    assert.deepEqual(server.numbers(), range(3));
  });

  test("that is left gives its queue up, and comes back with another", async (t) => {
    const server = await serve(t, { ...ok, delayMs: 300 });
    const events = client(t, server, NEVER);
    numbered(events, 2);
    page.leave();
    assert.equal([...page.storage.map.keys()].filter((key) => key.includes(" ~")).length, 0);
    numbered(events, 1, 2); // What other listeners send is for the next visit.
    await sleep(100);
    assert.deepEqual(page.storage.numbers, range(3));
    await until(() => page.storage.numbers.length === 1);
    page.comeBack();
    numbered(events, 1, 3);
    await events.flush();
    assert.deepEqual(server.numbers(), range(4));
  });

  test("without ids: what is handed over counts as sent", async (t) => {
    const server = await serve(t, { ...ok, delayMs: 100 }, { ...ok, delayMs: 100 });
    const events = client(t, server, { ...NEVER, id: false, waitMs: 10 });
    numbered(events, 2);
    await until(() => server.requests.length === 1);
    numbered(events, 2, 2);
    assert.equal(page.storage.numbers.length, 4);
    page.leave();
    assert.deepEqual(page.storage.numbers, []);
    const next = client(t, server, { ...NEVER, id: false });
    next.send({ n: 4 });
    await next.flush();
    await sleep(150);
    assert.deepEqual(server.numbers(), range(5));
  });

  test("without ids: an answer counts all the same", async (t) => {
    hurry(t, 20);
    const server = await serve(t, refusal(503, "busy"));
    const events = client(t, server, { ...NEVER, id: false });
    numbered(events, 2);
    page.show("hidden");
    assert.deepEqual(page.storage.numbers, []);
    await until(() => page.storage.numbers.length === 2);
    await until(() => page.storage.numbers.length === 0);
    assert.deepEqual(server.numbers(), [0, 1, 0, 1]);
  });

  test("without ids: nothing is handed over to a server that does not answer", async (t) => {
    const server = await serve(t, cut);
    const events = client(t, server, { id: false });
    numbered(events, 2);
    await until(() => server.requests.length === 1);
    await sleep(50);
    page.leave();
    assert.deepEqual(page.storage.numbers, [0, 1]);
    assert.equal(page.made.length, 1);
  });

  test("without ids: what was handed over before the page was left is not sent again when it comes back", async (t) => {
    const server = await serve(t, { ...cut, delayMs: 50 });
    const events = client(t, server, { ...NEVER, id: false });
    numbered(events, 2);
    page.leave();
    page.comeBack();
    await sleep(100);
    await events.flush();
    assert.deepEqual(server.numbers(), range(2));
  });

  test("with ids: what is left is handed over to a server that does not answer, too", async (t) => {
    const server = await serve(t, cut);
    const events = client(t, server);
    numbered(events, 2);
    await until(() => server.requests.length === 1);
    await sleep(50);
    page.leave();
    await until(() => server.requests.length === 2);
    assert.deepEqual(server.numbers(), [0, 1, 0, 1]);
  });

  test("has a queue in memory where localStorage is forbidden", async (t) => {
    Object.defineProperty(globalThis, "localStorage", {
      get() {
        throw new DOMException("no", "SecurityError");
      },
    });
    const server = await serve(t);
    const events = client(t, server);
    numbered(events, 2);
    await events.flush();
    assert.deepEqual(server.numbers(), range(2));
  });

  test("sends a beacon where fetch knows no keepalive: a string, and no more than 64 kB", async (t) => {
    const { keepalive } = Object.getOwnPropertyDescriptors(Request.prototype);
    delete Request.prototype.keepalive;
    const { Attolytics } = await import("../attolytics.js?old");
    Object.defineProperty(Request.prototype, "keepalive", keepalive);
    const beacons = [];
    let room = true;
    replace(t, "navigator", {
      sendBeacon: (url, body) => room && beacons.push([url, JSON.parse(body).events.map((event) => event.n)]) > 0,
    });
    for (const [id, left] of [
      ["id", [0, 1]],
      [false, []],
    ]) {
      const events = new Attolytics({ url: "http://a.b", app: "c", key: "k", table: "t", id, ...NEVER });
      numbered(events, 2);
      room = false;
      page.show("hidden");
      assert.deepEqual(page.storage.numbers, [0, 1]);
      room = true;
      page.show("hidden");
      assert.deepEqual(beacons, [["http://a.b/apps/c/events", [0, 1]]]);
      assert.deepEqual(page.storage.numbers, left);
      beacons.pop();
      events.stop();
      events.forget();
    }
  });
});
