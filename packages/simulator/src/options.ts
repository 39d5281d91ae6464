/** Parsers of command options: each turns the text of one option into a checked value, or says what is wrong. */
import { InvalidArgumentError } from "commander";

/** A whole number within the bounds, both included. */
export function integerOption(minimum: number, maximum: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (!Number.isInteger(value) || value < minimum || value > maximum) {
      throw new InvalidArgumentError(`give a whole number from ${minimum} to ${maximum}`);
    }
    return value;
  };
}
