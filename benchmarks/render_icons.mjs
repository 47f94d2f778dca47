// Render icons of Iconify's JSON sets to raw RGBA files. `train_coloured.py --stage render` calls it:
//
//     node render_icons.mjs PACKAGES_FOLDER SET PIXELS OUTPUT_FOLDER NAME...
//
// PACKAGES_FOLDER is where `npm install` was run. Writes OUTPUT_FOLDER/NAME.rgba for each name and prints the name once
// it is written: after a crash of the renderer the last name printed tells which icon it was.

import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";

const [folder, set, pixels, output, ...names] = process.argv.slice(2);
const { Resvg } = createRequire(join(resolve(folder), "package.json"))("@resvg/resvg-js");
const icons = JSON.parse(readFileSync(join(folder, "node_modules", "@iconify-json", set, "icons.json"), "utf-8"));

for (const name of names) {
  const icon = icons.icons[name] ?? icons.icons[icons.aliases?.[name]?.parent];
  if (icon === undefined) {
    console.error(`${set} has no icon "${name}"`);
    process.exit(2);
  }
  const [left, top] = [icon.left ?? 0, icon.top ?? 0];
  const [width, height] = [icon.width ?? icons.width ?? 16, icon.height ?? icons.height ?? 16];
  const side = Math.max(width, height);
  const box = `${left - (side - width) / 2} ${top - (side - height) / 2} ${side} ${side}`;
  const svg =
    `<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" ` +
    `width="${pixels}" height="${pixels}" viewBox="${box}">${icon.body}</svg>`;
  const image = new Resvg(svg, { fitTo: { mode: "width", value: Number(pixels) } }).render();
  if (image.width !== Number(pixels) || image.height !== Number(pixels)) {
    console.error(`${set}:${name} came out at ${image.width}x${image.height} pixels`);
    process.exit(2);
  }
  writeFileSync(join(output, `${name}.rgba`), image.pixels);
  console.log(name);
}
