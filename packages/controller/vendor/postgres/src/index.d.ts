export { default } from "postgres";
export type * from "postgres";
