import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";
import { gzipSync } from "node:zlib";

import { Attolytics } from "../attolytics.js";

const file = (name) => new URL(`../${name}`, import.meta.url);

test("the client is smaller than 4 kB, minified and compressed", async (t) => {
  const esbuild = await import("esbuild").catch(() => null);
  if (!esbuild) return t.skip("esbuild is not installed: npm install --no-save");
  const { code } = await esbuild.transform(await readFile(file("attolytics.js")), { minify: true, format: "esm" });
  const bytes = gzipSync(code, { level: 9 }).length;
  t.diagnostic(`${bytes} bytes`);
  assert.ok(bytes < 4_000, `${bytes}`);
});

test("the types name what the class has, and the options those that it knows", async () => {
  const [types, source] = await Promise.all(
    ["attolytics.d.ts", "attolytics.js"].map((name) => readFile(file(name), "utf8")),
  );
  for (const name of Object.getOwnPropertyNames(Attolytics.prototype)) {
    assert.match(types, new RegExp(`^  (get )?${name}\\b`, "m"));
  }
  const [, defaults] = /DEFAULTS = \{(.*?)\n\};/s.exec(source);
  const [, options] = /interface Options \{(.*?)\n\}/s.exec(types);
  const known = [...options.matchAll(/^  (\w+)\??[:(]/gm)].map(([, name]) => name);
  const used = [...defaults.matchAll(/^  (\w+):/gm)].map(([, name]) => name);
  assert.deepEqual(
    used.filter((name) => !known.includes(name)),
    [],
  );
  for (const name of known) assert.ok(source.includes(name), name);
});

test("the package needs nothing at run time", async () => {
  const description = JSON.parse(await readFile(file("package.json")));
  assert.equal(description.dependencies, undefined);
  const source = await readFile(file("attolytics.js"), "utf8");
  assert.doesNotMatch(source, /^import /m);
});
