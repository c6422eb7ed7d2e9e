// Draws pixel-art avatars (DiceBear, CC0); called by make_avatars.py, which installs the packages beside a copy of
// this file. Usage: node make_avatars.mjs COUNT SEED; one JSON object a line: DiceBear's attributes and the PNG.
import { createAvatar } from "@dicebear/core";
import * as pixelArt from "@dicebear/pixel-art";
import { Resvg } from "@resvg/resvg-js";

const [count, seed] = process.argv.slice(2).map(Number);
for (let i = 0; i < count; i++) {
  const avatar = createAvatar(pixelArt, {
    seed: `${seed}-${i}`, size: 32, backgroundColor: ["b6e3f4", "c0aede", "ffd5dc", "ffdfbf"],
    // rarer by default: balanced here, so that every attribute can be measured
    beardProbability: 15, glassesProbability: 30, hatProbability: 20, accessoriesProbability: 20,
  });
  const png = new Resvg(avatar.toString()).render().asPng().toString("base64");
  console.log(JSON.stringify({ ...avatar.toJson().extra, seed: `${seed}-${i}`, png }));
}
